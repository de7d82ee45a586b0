"""Attention back ends on one shared row at the head counts of 3B and 7B: speed, share of the peak, error."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu_day.day import Day
from benchmarks.gpu_day.learner import matmul_peak
from benchmarks.learner import clock
from rsgrpo.learning import attention
from rsgrpo.learning.attention import PrefixRow
from rsgrpo.types import PrefixLayout

Kernel = Callable[..., torch.Tensor]
HEADS = {"3B": (16, 2), "7B": (28, 4)}
HEAD_DIM = 128
SEEN_LENGTHS = 3


def kernels(day: Day) -> dict[str, tuple[Kernel, Callable[[], AbstractContextManager[object]]]]:
    """Return every back end: the learner's own, and torch's kernels pinned one by one."""
    found: dict[str, tuple[Kernel, Callable[[], AbstractContextManager[object]]]] = {
        "as the learner calls it": (attention.prefix_sdpa, nullcontext)
    }
    if day.on_gpu:
        pinned = {"flash": "FLASH_ATTENTION", "cudnn": "CUDNN_ATTENTION", "efficient": "EFFICIENT_ATTENTION"}
        for name, backend in pinned.items():
            choose = [getattr(SDPBackend, backend)]
            found[f"torch, {name} alone"] = (attention.prefix_sdpa, partial(sdpa_kernel, choose))
        found["torch, varlen"] = (torch_varlen, nullcontext)
    found["flash-attn, varlen"] = (attention.prefix_varlen, nullcontext)
    return found


def torch_varlen(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, row: PrefixRow) -> torch.Tensor:
    """As `prefix_varlen`, by the kernel that torch brings; CUDA only. Not a back end of the learner: a candidate."""
    from torch.nn.attention import varlen

    attend: Any = varlen.varlen_attn
    query_bounds, key_bounds, key_positions, longest_query, longest_key = row.varlen
    states = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]
    states[1:] = [tensor.index_select(0, key_positions) for tensor in states[1:]]
    options: dict[str, Any] = {"window_size": (-1, 0)}  # causal, aligned to the last key
    if "enable_gqa" in inspect.signature(attend).parameters:
        options["enable_gqa"] = True
    else:  # torch 2.11
        copies = query.shape[1] // key.shape[1]
        states[1:] = [tensor.repeat_interleave(copies, 1) for tensor in states[1:]]
    output: Any = attend(*states, query_bounds, key_bounds, longest_query, longest_key, **options)
    rows: torch.Tensor = output[None]
    return rows


def states(heads: tuple[int, int], num_tokens: int, device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
    """Return query, key and value, (1, heads, T, head_dim)."""
    generator = torch.Generator(device).manual_seed(0)
    return [
        torch.randn(1, count, num_tokens, HEAD_DIM, generator=generator, device=device).to(dtype).requires_grad_()
        for count in (heads[0], heads[1], heads[1])
    ]


def layout_of(prompt: int, response: int, group: int) -> PrefixLayout:
    """Return one group's layout."""
    return PrefixLayout((prompt,), ((response,) * group,))


def run(day: Day) -> None:
    """Measure every back end; one that cannot run here says why."""
    peak = matmul_peak(day)
    prompt, response, group = day.pick((11_000, 700, 8), (120, 10, 3))
    pairs = prompt**2 / 2 + group * (prompt * response + response**2 / 2)
    for size, heads in HEADS.items():
        flops = 2 * 2 * pairs * heads[0] * HEAD_DIM
        table = day.record.table(
            f"{size} heads ({heads[0]}/{heads[1]} x {HEAD_DIM}), prompt {prompt:,}, {group} responses of {response}",
            ["back end", "forward ms", "backward ms", "share of the matmul peak", "error (small row)"],
        )
        for name, (kernel, pin) in kernels(day).items():
            try:
                with pin():
                    error = error_of(day, kernel, heads)
                    forward, backward = milliseconds(day, kernel, heads, layout_of(prompt, response, group))
            except (RuntimeError, ImportError) as reason:
                day.record.row(table, name, None, None, str(reason).splitlines()[0][:80], None)
                continue
            share = 3.5 * flops / ((forward + backward) / 1e3) / 1e12 / peak  # backward: five products for two
            day.record.row(table, name, forward, backward, f"{share:.0%}", error)
    first_calls(day)


def milliseconds(day: Day, kernel: Kernel, heads: tuple[int, int], layout: PrefixLayout) -> tuple[float, float]:
    """Return the best times of forward and backward over a row."""
    num_tokens = layout.prompt_lengths[0] + sum(layout.response_lengths[0])
    inputs = states(heads, num_tokens, day.device, day.dtype())
    row = PrefixRow(layout, day.device, day.dtype())
    forward = backward = float("inf")
    for _ in range(day.pick(4, 2)):
        start = clock(day.device)
        output = kernel(*inputs, row)
        middle = clock(day.device)
        output.backward(torch.ones_like(output))
        forward, backward = min(forward, middle - start), min(backward, clock(day.device) - middle)
    return 1e3 * forward, 1e3 * backward


def error_of(day: Day, kernel: Kernel, heads: tuple[int, int]) -> float:
    """Return the relative error of a small row's output and gradients against float32 on the CPU; the largest."""
    layout = PrefixLayout((96, 17), ((24, 5, 31), (12,)))
    num_tokens = sum(layout.prompt_lengths) + sum(map(sum, layout.response_lengths))
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(1, count, num_tokens, HEAD_DIM, generator=generator) for count in (heads[0], *heads[1:] * 2)]

    def results(device: torch.device, dtype: torch.dtype, function: Kernel) -> list[torch.Tensor]:
        inputs = [tensor.to(device, dtype).requires_grad_() for tensor in drawn]
        output = function(*inputs, PrefixRow(layout, device, dtype))
        output.float().square().sum().backward()
        gradients = [tensor.grad for tensor in inputs]
        return [tensor.detach().float().cpu() for tensor in (output, *gradients) if tensor is not None]

    wanted = results(torch.device("cpu"), torch.float32, attention.prefix_sdpa)
    found = results(day.device, day.dtype(), kernel)
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True))


def first_calls(day: Day) -> None:
    """Record what the first row of a new length costs: some kernels plan for every shape that they meet."""
    table = day.record.table("A row of a new length (7B heads)", ["prompt", "first call ms", "second call ms"])
    for index in range(SEEN_LENGTHS):
        prompt = day.pick(9_001, 91) + 37 * index
        inputs = states(HEADS["7B"], prompt, day.device, day.dtype())
        row = PrefixRow(PrefixLayout((prompt,), ((),)), day.device, day.dtype())
        kernel: Kernel = attention.prefix_sdpa
        times = []
        for _ in range(2):
            clock(day.device)
            start = time.perf_counter()
            kernel(*inputs, row).sum().backward()
            clock(day.device)
            times.append(1e3 * (time.perf_counter() - start))
        day.record.row(table, float(prompt), *times)
