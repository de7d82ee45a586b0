"""The learner's step against plain ones: same weights, same batch, gradients checked equal, in one run.

    python benchmarks/learner.py                                  # small width on CPU, minutes
    python benchmarks/learner.py --sweep                          # growth with prompt, group and images
    python benchmarks/learner.py --policies                       # ours under each way of gradient checkpointing
    python benchmarks/learner.py --device cuda --size 7b          # Qwen2.5-VL-7B's shape, random weights
    python benchmarks/learner.py --family qwen3_5                 # recurrent layers, which fork the prompt's state

Needs torch and transformers only. A step is forward and backward over one group; three sides make it:

    plain   one row per response, the tower in every row of both passes, an old-logprob pass, logits of every token
    best    one row per response, but features once, no old pass, logits of response tokens only, in chunks
    ours    one row per group: prompt, tower and head as in rsgrpo.learning.policy

No optimiser and no sharding: both are the same for all sides.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import platform
import sys
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.learner_sides import FAMILIES, WORK, Bench, Shape, Work
from rsgrpo.learning.passes import cost_model
from rsgrpo.report.line_chart import line_chart

SIDES = ("plain", "best", "ours")


class PeakTensors(TorchDispatchMode):
    """Counts bytes of live tensor storages beside the model's weights; `peak` is their most.

    For CPU, where no allocator counts them.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen = {parameter.untyped_storage()._cdata: 0 for parameter in model.parameters()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._seen:
            self._seen[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.now -= self._seen.pop(key, 0)


def attention_flops(backward: bool) -> Callable[..., int]:
    """Return the formula of one attention kernel: two products of queries and keys forward, five backward."""

    def count(*shapes: Any, out_shape: Any = None, **_: Any) -> int:
        query, key = (shapes[1], shapes[2]) if backward else (shapes[0], shapes[1])
        batch, heads, queries, head_dim = query
        return (5 if backward else 2) * 2 * batch * heads * queries * key[2] * head_dim

    return count


KERNELS = ("flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention")
FLOP_FORMULAS: dict[Any, Any] = {
    getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}{suffix}"): attention_flops(suffix != "")
    for kernel in KERNELS
    for suffix in ("", "_backward")
}


def clock(device: torch.device) -> float:
    """Return wall seconds once all kernels are done; on CPU the process's own, which other programs do not lengthen."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def count(bench: Bench, side: Callable[[], float]) -> dict[str, float]:
    """Return counted FLOPs and peak bytes beyond weights of one side."""
    counter = FlopCounterMode(display=False, custom_mapping=FLOP_FORMULAS)
    with counter:
        side()
    bench.model.zero_grad(set_to_none=True)
    gc.collect()
    peak = PeakTensors(bench.model)  # in a run of its own: the counter of FLOPs keeps activations alive
    with peak:
        side()
    bench.model.zero_grad(set_to_none=True)
    peak_bytes = peak.peak
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        side()
        bench.model.zero_grad(set_to_none=True)
        peak_bytes = torch.cuda.max_memory_allocated() - before
    return {"tflops": counter.get_total_flops() / 1e12, "peak_gib": peak_bytes / 2**30}


def best_seconds(bench: Bench, sides: Sequence[str], repeats: int) -> dict[str, float]:
    """Return each side's seconds, best of `repeats`, in turns so that a busy moment hits all sides alike."""
    best = dict.fromkeys(sides, float("inf"))
    for _ in range(repeats):
        for name in sides:
            start = clock(bench.device)
            getattr(bench, name)()
            best[name] = min(best[name], clock(bench.device) - start)
            bench.model.zero_grad(set_to_none=True)
    return best


def check_equal(bench: Bench) -> dict[str, float]:
    """Return relative differences between the sides: of the whole gradient, of its worst tensor, of the loss.

    Of a model with recurrent layers the worst tensor is one whose gradient, a sum over all tokens, nearly cancels.
    """
    loss, reference = bench.gradients(bench.ours)
    report = {}
    for name in ("plain", "best"):
        other_loss, other = bench.gradients(getattr(bench, name))
        assert other.keys() == reference.keys()
        gaps = {n: (float((reference[n] - other[n]).norm()), float(other[n].norm())) for n in other}
        report[f"gradient ours/{name}"] = math.hypot(*(gap for gap, _ in gaps.values())) / math.hypot(
            *(norm for _, norm in gaps.values())
        )
        report[f"worst tensor ours/{name}"] = max(gap / (norm + 1e-12) for gap, norm in gaps.values())
        report[f"loss ours/{name}"] = abs(loss - other_loss) / (abs(other_loss) + 1e-12)
    return report


def peak_matmul_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """Return the measured rate of a large matrix product."""
    size, products = (8192, 10) if device.type == "cuda" else (1024, 1)
    one, other = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(8):
        start = clock(device)
        for _ in range(products):
            one @ other
        best = min(best, (clock(device) - start) / products)
    return 2 * size**3 / best / 1e12


def useful_tflops(bench: Bench) -> float:
    """Return the FLOPs that no learner can do without: the group's forward and backward, causal halves only."""
    work = bench.work
    forward = cost_model(bench.policy).cost(work.prompt, [work.response] * work.group)
    return 3 * forward / 1e12


def report_sides(results: dict[str, dict[str, float]], bench: Bench, dtype: torch.dtype) -> None:
    print("\n| side | TFLOP | seconds | peak GiB | FLOPs / ours | seconds / ours | peak / ours |")
    print("|---|---|---|---|---|---|---|")
    ours = results["ours"]
    for name, row in results.items():
        ratios = " | ".join(f"{row[key] / ours[key]:.1f}" for key in ("tflops", "seconds", "peak_gib"))
        print(f"| {name} | {row['tflops']:.3f} | {row['seconds']:.2f} | {row['peak_gib']:.2f} | {ratios} |")
    tokens = bench.work.prompt + bench.work.group * bench.work.response
    peak, useful = peak_matmul_tflops(bench.device, dtype), useful_tflops(bench)
    print(
        f"\nours: {tokens / ours['seconds']:,.0f} tokens/s (prompt once); useful {useful:.3f} TFLOP = "
        f"{useful / ours['seconds']:.3f} TFLOP/s, {100 * useful / ours['seconds'] / peak:.0f}% of a matrix product's "
        f"{peak:.3f} TFLOP/s"
    )


POLICIES = ("none", "every_n:4", "every_n:2", "attention", "full")


def compare_policies(shape: Shape, work: Work, options: dict[str, Any], repeats: int) -> dict[str, dict[str, float]]:
    """Print and return our side's FLOPs, seconds and peak under every policy, checked to give the same gradients."""
    found: dict[str, dict[str, float]] = {}
    expected: dict[str, torch.Tensor] = {}
    print("\n| checkpointing | TFLOP | seconds | peak GiB |\n|---|---|---|---|")
    for how in POLICIES:
        bench = Bench(shape, work, **options, checkpointing=how)
        _, gradients = bench.gradients(bench.ours)
        expected = expected or gradients
        assert all((gradients[n] - expected[n]).norm() <= 1e-5 * expected[n].norm() for n in expected), how
        row = count(bench, bench.ours) | {"seconds": best_seconds(bench, ("ours",), repeats)["ours"]}
        found[how] = row
        print(f"| {how} | {row['tflops']:.3f} | {row['seconds']:.2f} | {row['peak_gib']:.2f} |", flush=True)
    return found


SWEEPS: dict[str, Callable[[Work], list[Work]]] = {
    "prompt": lambda w: [replace(w, prompt=w.prompt * k // 2) for k in (2, 3, 4, 6)],
    "group": lambda w: [replace(w, group=k) for k in (1, 2, 4, 8, 16)],
    "images": lambda w: [replace(w, images=k) for k in (0, 1, 3, 5)],
}


def sweep(bench: Bench, repeats: int) -> dict[str, list[dict[str, float]]]:
    """Return seconds of the sides as one quantity grows."""
    base = bench.work
    found: dict[str, list[dict[str, float]]] = {}
    for name, works in SWEEPS.items():
        print(f"\n| {name} | plain s | best s | ours s | plain / ours | best / ours |\n|---|---|---|---|---|---|")
        for work in works(base):
            bench.change(work)
            row = {name: float(getattr(work, name))}
            row |= best_seconds(bench, SIDES, repeats)
            found.setdefault(name, []).append(row)
            ratios = f"{row['plain'] / row['ours']:.1f} | {row['best'] / row['ours']:.1f}"
            print(
                f"| {row[name]:.0f} | {row['plain']:.2f} | {row['best']:.2f} | {row['ours']:.2f} | {ratios} |",
                flush=True,
            )
    return found


def plot(found: dict[str, list[dict[str, float]]], folder: Path) -> None:
    """Write `learner_<quantity>.svg` for every sweep."""
    titles = {"prompt": "prompt tokens", "group": "responses per prompt", "images": "images per prompt"}
    for name, rows in found.items():
        series = {side: [row[side] for row in rows] for side in SIDES}
        path = folder / f"learner_{name}.svg"
        line_chart(path, "Seconds of one learner step", titles[name], [row[name] for row in rows], series)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--family", choices=list(FAMILIES), default="qwen2_5_vl")
    parser.add_argument("--size", choices=list(WORK), default="small", help="3b, 7b: qwen2_5_vl; 9b: qwen3_5")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: float32 on CPU, bfloat16 on CUDA")
    parser.add_argument("--attention", choices=["auto", "sdpa", "flash"], default="auto")
    parser.add_argument("--prompt", type=int, help="prompt tokens, images included")
    parser.add_argument("--response", type=int, help="tokens of each response")
    parser.add_argument("--group", type=int, help="responses")
    parser.add_argument("--images", type=int)
    parser.add_argument("--image-tokens", type=int, dest="image_tokens")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves it to torch")
    parser.add_argument("--checkpointing", default="full", help="none, full, attention or every_n:K")
    parser.add_argument("--compile", action="store_true", help="torch.compile of the decoder layers, for all sides")
    parser.add_argument("--policies", action="store_true", help="our side under each way of gradient checkpointing")
    parser.add_argument("--sweep", action="store_true", help="seconds against prompt, group and images instead")
    parser.add_argument("--plot", type=Path, help="with --sweep: folder for one SVG chart of each quantity")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.size not in FAMILIES[args.family]:
        parser.error(f"--size {args.size}: sizes of {args.family} are {', '.join(FAMILIES[args.family])}")
    shape = FAMILIES[args.family][args.size]
    device = torch.device(args.device)
    dtype = getattr(torch, args.dtype or ("bfloat16" if args.device == "cuda" else "float32"))
    changes = {key: value for key in asdict(WORK["small"]) if (value := getattr(args, key)) is not None}
    work = replace(WORK[args.size], **changes)
    name = torch.cuda.get_device_name() if args.device == "cuda" else f"{torch.get_num_threads()} CPU thread(s)"
    print(
        f"torch {torch.__version__}, {name}, {platform.machine()}, {dtype}, {args.family} {args.size}: {work}",
        flush=True,
    )
    options: dict[str, Any] = {"device": device, "dtype": dtype, "attention": args.attention, "compiled": args.compile}
    if args.policies:
        compare_policies(shape, work, options, args.repeats)
        return
    bench = Bench(shape, work, **options, checkpointing=args.checkpointing)
    num_parameters = sum(parameter.numel() for parameter in bench.model.parameters())
    print(f"{num_parameters / 1e6:,.1f} M parameters, attention {bench.policy.attention}", flush=True)
    results: Any
    if args.sweep:
        results = sweep(bench, args.repeats)
        if args.plot:
            plot(results, args.plot)
    else:
        equal = check_equal(bench)
        print("; ".join(f"{key} {value:.1e}" for key, value in equal.items()), flush=True)
        seconds = best_seconds(bench, SIDES, args.repeats)
        results = {side: {**count(bench, getattr(bench, side)), "seconds": seconds[side]} for side in SIDES}
        report_sides(results, bench, dtype)
    if args.json:
        args.json.write_text(json.dumps({"work": asdict(work), "shape": asdict(shape), "results": results}, indent=2))


if __name__ == "__main__":
    main()
