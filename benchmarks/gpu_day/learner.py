"""A learner's step on the device: against plain and padding-free best, in float32, checkpointed, and as it grows."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu_day.day import Day
from benchmarks.learner import FLOP_FORMULAS, SIDES, SWEEPS, PeakTensors, clock, peak_matmul_tflops, useful_tflops
from benchmarks.learner_sides import SHAPES, WORK, Bench, Work

TINY = replace(SHAPES["small"], layers=3, vocab=1024)
TINY_WORK = Work(prompt=160, response=12, group=4, images=2, image_tokens=30)
REPEATS = {"ours": 3, "best": 2, "plain": 1}
EXACT = 1e-3
"""Largest relative difference of float32 gradients that different orders of summation explain."""


def matmul_peak(day: Day) -> float:
    """Return, and record, the rate of a large matrix product in TFLOP/s: what shares are shares of."""
    return day.record.figure("matrix product TFLOP/s", peak_matmul_tflops(day.device, day.dtype()))


def peak_gib(bench: Bench, side: Callable[[], object]) -> float:
    """Return the most memory that a pass holds beside the weights, in GiB; its gradients are part of it."""
    bench.model.zero_grad(set_to_none=True)
    if bench.device.type != "cuda":
        with PeakTensors(bench.model) as peak:
            side()
        return peak.peak / 2**30
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    side()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def seconds_of(bench: Bench, side: Callable[[], object], repeats: int = 1) -> float:
    """Return the best of some passes, in seconds."""
    best = float("inf")
    for _ in range(repeats):
        bench.model.zero_grad(set_to_none=True)
        start = clock(bench.device)
        side()
        best = min(best, clock(bench.device) - start)
    return best


def differences(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> tuple[float, float]:
    """Return the median and the largest relative difference of two gradients, over parameters."""
    assert found.keys() == wanted.keys()
    each = [
        float((found[name].float() - wanted[name].float()).norm() / (wanted[name].float().norm() + 1e-20))
        for name in wanted
    ]
    return statistics.median(each), max(each)


def ratios(day: Day, size: str) -> None:
    """Time ours, best and plain on the same work, compare their gradients, and say where our seconds go."""
    peak = matmul_peak(day)
    shape, work = day.pick(SHAPES[size], TINY), day.pick(WORK[size], TINY_WORK)
    bench = Bench(shape, work, day.device, day.dtype())
    record = day.record
    record.note(
        f"{sum(p.numel() for p in bench.model.parameters()) / 1e9:.2f} B parameters, {day.dtype()}, random; prompt of "
        f"{work.prompt:,} tokens with {work.images} images of {work.image_tokens:,}, {work.group} responses of "
        f"{work.response}; full gradient checkpointing; attention {bench.policy.attention}"
    )
    _, reference = bench.gradients(bench.ours)  # also warms up
    useful = useful_tflops(bench)
    seconds: dict[str, float] = {}
    table = record.table(
        "One group, forward and backward (differences are of gradients, relative, from ours)",
        ["side", "seconds", "seconds / ours", "peak GiB", "share of the matmul peak", "median diff", "largest diff"],
    )
    for name in reversed(SIDES):
        side = getattr(bench, name)
        try:
            _, gradients = bench.gradients(side)
            median, largest = differences(gradients, reference)
            del gradients
            memory = peak_gib(bench, side)
            seconds[name] = seconds_of(bench, side, REPEATS[name])
        except torch.OutOfMemoryError:
            record.row(table, name, "out of memory", None, None, None, None, None)
            continue
        finally:
            bench.model.zero_grad(set_to_none=True)
        share = useful / seconds[name] / peak
        ratio = seconds[name] / seconds["ours"]
        record.row(table, name, seconds[name], f"{ratio:.2f}", memory, f"{share:.1%}", median, largest)
        if name == "ours":
            tokens = work.prompt + work.group * work.response
            record.figure("ours: tokens/s, the prompt counted once", tokens / seconds[name])
            record.figure("ours: useful TFLOP (causal halves, nothing twice)", useful)
    parts(day, bench)


def parts(day: Day, bench: Bench) -> None:
    """Record where our pass spends its time and how many FLOPs it runs."""
    record = day.record
    table = record.table("Where our seconds go", ["part", "seconds"])
    features = bench._features()
    row = bench._row(bench._prompt(features), bench.batch.samples)

    def forward() -> None:
        with torch.no_grad():
            bench.policy(row, 1.0, False)

    for name, part in {
        "vision tower": bench._features,
        "packing and copying the row": lambda: bench._row(bench._prompt(features), bench.batch.samples),
        "forward of decoder and head": forward,
        "forward, recomputation and backward": lambda: bench._backward(bench.policy(row, 1.0, False), row),
    }.items():
        part()
        record.row(table, name, seconds_of(bench, part, 2))
    counter = FlopCounterMode(display=False, custom_mapping=FLOP_FORMULAS)
    with counter:
        bench.ours()
    record.figure("ours: TFLOP that it runs (recomputation, tower, full squares)", counter.get_total_flops() / 1e12)


ratios_7b = partial(ratios, size="7b")
ratios_3b = partial(ratios, size="3b")


def exactness(day: Day) -> None:
    """Compare the three sides in float32, where only the order of sums may differ.

    Raises:
        AssertionError: they differ by more.
    """
    shape = day.pick(replace(SHAPES["3b"], layers=6, vision_depth=8), TINY)
    work = day.pick(Work(prompt=2200, response=140, group=4, images=2, image_tokens=500), TINY_WORK)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    bench = Bench(shape, work, day.device, torch.float32)
    loss, gradients = bench.gradients(bench.ours)
    table = day.record.table(
        "Float32, relative differences from ours", ["side", "loss", "gradients, median", "gradients, largest"]
    )
    worst = 0.0
    for name in ("best", "plain"):
        other_loss, other = bench.gradients(getattr(bench, name))
        median, largest = differences(gradients, other)
        day.record.row(table, name, abs(loss - other_loss) / (abs(other_loss) + 1e-12), median, largest)
        worst = max(worst, largest)
    assert worst < EXACT, f"gradients differ by {worst:.1e} in float32"


def checkpointing(day: Day) -> None:
    """Record seconds and peak of our pass under each way of gradient checkpointing."""
    shape, work = day.pick(SHAPES["3b"], TINY), day.pick(WORK["3b"], TINY_WORK)
    table = day.record.table("One group at 3B shape", ["learner.gradient_checkpointing", "seconds", "peak GiB"])
    for how in ("full", "attention", "every_n:2", "every_n:4", "none"):
        try:
            bench = Bench(shape, work, day.device, day.dtype(), checkpointing=how)
            bench.ours()
            day.record.row(table, how, seconds_of(bench, bench.ours, 2), peak_gib(bench, bench.ours))
        except torch.OutOfMemoryError:
            day.record.row(table, how, "out of memory", None)
        bench = None  # type: ignore[assignment]  # the next model needs its memory
        if day.on_gpu:
            torch.cuda.empty_cache()


def growth(day: Day) -> None:
    """Record seconds of best and ours as prompts and groups grow, and of plain where it is not too slow."""
    shape, work = day.pick(SHAPES["3b"], TINY), day.pick(WORK["3b"], TINY_WORK)
    bench = Bench(shape, work, day.device, day.dtype())
    for quantity in ("group", "prompt"):
        table = day.record.table(f"Seconds against {quantity}", [quantity, "best", "ours", "best / ours"])
        for changed in _smaller_first(SWEEPS[quantity](work), quantity):
            bench.change(changed)
            bench.ours()
            ours, best = seconds_of(bench, bench.ours, 2), seconds_of(bench, bench.best)
            day.record.row(table, float(getattr(changed, quantity)), best, ours, f"{best / ours:.1f}")


def _smaller_first(works: Sequence[Work], quantity: str) -> list[Work]:
    return sorted(works, key=lambda work: int(getattr(work, quantity)))
