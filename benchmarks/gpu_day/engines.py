"""What needs vLLM, and Ray: its speed, weight sync, sleep, and the demo with GPUs shared and apart."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.gpu_day.day import Day, Skipped
from benchmarks.gpu_day.material import TOKEN_PIXELS, model_folder, rows
from benchmarks.gpu_day.rl import command, on_device, tolerant, warm_start
from rollout.config import InputsConfig, RolloutConfig, VllmConfig
from rollout.types import Prompt, SamplingParams
from rsgrpo.records.tracking import read_metrics

PHASES = ("sample", "learn", "sync", "step")


def throughput(day: Day) -> None:
    """Record tokens/s of vLLM and of the embedded engine on one model and the same prompts."""
    from benchmarks.rollout import alone
    from rollout.files import read_jsonl

    images, image_tokens, words = day.pick((5, 2000, 880), (2, 16, 20))
    prompts, group, response = day.pick((8, 8, 512), (2, 4, 12))
    path = model_folder(day, "3b", image_tokens=image_tokens)
    data = rows(day.work / "rows_throughput", prompts, images, image_tokens, words)
    found = [row for _, row in read_jsonl(data)]
    asked = [Prompt(row["id"], row["prompt"], tuple(row["image"])) for row in found]
    table = day.record.table(
        f"{prompts} prompts of {images} pages, {group} responses of {response} tokens, 3B shape",
        ["engine", "tokens/s", "seconds", "start s"],
    )
    inputs = InputsConfig(TOKEN_PIXELS, image_tokens * TOKEN_PIXELS, images, images * (image_tokens + 2) + 1500)
    for engine in ("vllm", "hf"):
        rollout = RolloutConfig(
            engine=engine,
            group_size=group,
            max_response_tokens=response,
            max_batch_sequences=prompts * group,
            dtype="bfloat16" if day.on_gpu else "float32",
            vllm=small_vllm(day, sleep_level=0),
        )
        figures = alone(sampling_speed, path, rollout, inputs, asked, group, response)
        day.record.row(table, engine, figures["tokens_per_s"], figures["seconds"], figures["start_s"])


def sampling_speed(
    path: str, rollout: RolloutConfig, inputs: InputsConfig, prompts: list[Prompt], group: int, response: int
) -> dict[str, float]:
    """Sample once in this process, after a short prompt that warms up."""
    from rollout.build import build_engine

    started = time.perf_counter()
    engine = build_engine(path, rollout, inputs)
    start_s = time.perf_counter() - started
    try:
        warm_up = [Prompt("warm-up", "what amount ?")]
        list(engine.generate(warm_up, SamplingParams(max_tokens=4)))
        started = time.perf_counter()
        groups = list(engine.generate(prompts, SamplingParams(group_size=group, max_tokens=response)))
        seconds = time.perf_counter() - started
    finally:
        engine.close()
    failed = [found.error for found in groups if found.error]
    assert not failed, failed[0]
    tokens = sum(len(sampled.token_ids_T) for found in groups for sampled in found.rollouts)
    return {"start_s": start_s, "seconds": seconds, "tokens_per_s": tokens / seconds}


def small_vllm(day: Day, sleep_level: Any) -> VllmConfig:
    """Return an engine that leaves most of the device to others."""
    cache = day.pick(16.0, 0.125)
    return VllmConfig(gpu_memory_utilization=0.4, kv_cache_gib=cache, sleep_level=sleep_level, verify_every=1)


def sync(day: Day) -> None:
    """Record seconds of sleep, wake and weight sync of one engine, and the memory that sleep gives back."""
    from transformers import AutoModelForImageTextToText

    from rollout.build import build_engine
    from rollout.vllm.peers import local_peer
    from rollout.vllm.weights_out import build_sender

    path = model_folder(day, "3b", image_tokens=day.pick(2000, 16))
    inputs = InputsConfig(TOKEN_PIXELS, 2000 * TOKEN_PIXELS, 5, 12_000)
    load: Any = AutoModelForImageTextToText.from_pretrained
    model = load(path, dtype=torch.float32).to(day.device)
    gib = sum(parameter.numel() for parameter in model.parameters()) * 4 / 2**30
    table = day.record.table(
        f"An engine on the learner's device, {gib:.1f} GiB of float32 weights",
        ["sleep level", "sleep s", "GiB given back", "wake weights s", "sync s", "wake cache s", "start s"],
    )
    for level in (1, 2) if day.on_gpu else (0,):
        rollout = RolloutConfig(
            engine="vllm", dtype="bfloat16" if day.on_gpu else "float32", vllm=small_vllm(day, level)
        )
        start_s, engine = timed(partial(build_engine, path, rollout, inputs, colocated=True))
        try:
            before = free_gib(day)
            sleep_s, _ = timed(engine.sleep)
            given = free_gib(day) - before
            wake_s, _ = timed(partial(engine.wake, ["weights"]))
            sender = build_sender([local_peer(engine)], backend=engine.backend, dtype=getattr(torch, rollout.dtype))
            for version in (1, 2):  # the second is timed
                sync_s, _ = timed(partial(sender.send, model.named_parameters(), version))
            sender.close()
            cache_s, _ = timed(partial(engine.wake, ["kv_cache"]))
            groups = list(engine.generate([Prompt("p", "what amount ?")], SamplingParams(max_tokens=4)))
            assert groups[0].error is None, groups[0].error
            day.record.row(table, float(level), sleep_s, given, wake_s, sync_s, cache_s, start_s)
        finally:
            engine.close()


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    """Return the seconds of a call and what it returned."""
    started = time.perf_counter()
    result = function()
    return time.perf_counter() - started, result


def free_gib(day: Day) -> float:
    """Return the free memory of the device; 0 on a CPU."""
    return float(torch.cuda.mem_get_info()[0] / 2**30) if day.on_gpu else 0.0


def placement(day: Day) -> None:
    """Train the demo under Ray with vLLM, on the layouts that this machine's GPUs allow."""
    gpus = torch.cuda.device_count() if day.on_gpu else 0
    layouts: dict[str, list[str]] = {
        "colocated": ["cluster.placement=colocated", f"rollout.vllm.sleep_level={1 if day.on_gpu else 0}"]
    }
    if gpus >= 2:
        layouts["disaggregated"] = ["cluster.placement=disaggregated"]
        layouts["colocated, 2 ranks"] = ["cluster.placement=colocated", "learner.num_ranks=2", "rollout.num_workers=2"]
    warm_start(day)
    few = ["algorithm.prompts_per_step=2", "rollout.group_size=4", "validation.at_start=false", "validation.every=0"]
    few += ["checkpoint.keep_best=0", "cluster.num_cpus=2"]
    steps = day.pick(10, 1)
    table = day.record.table(f"{steps} steps of the demo, median seconds", ["layout", *PHASES, "mismatch, largest"])
    for layout, overrides in layouts.items():
        name = "ray_" + layout.replace(", ", "_").replace(" ", "_")
        half = ["learner.precision=bfloat16", "rollout.dtype=bfloat16"] if day.on_gpu else []
        vllm = ["rollout=vllm", "rollout.vllm.kv_cache_gib=" + str(day.pick(4, 0.125))]
        run = [f"name={name}", f"total_steps={steps}", "guards.action=warn", *overrides, *half, *vllm]
        command(day, "rsgrpo.train", "recipe=demo", *run, *on_device(day), *tolerant(day), *day.pick([], few))
        taken = [row for row in read_metrics(day.work / "runs" / name) if "actor/loss" in row]
        if not taken:
            raise Skipped(f"{layout}: no step was taken")
        seconds = [sorted(row[f"time/{phase}"] for row in taken)[len(taken) // 2] for phase in PHASES]
        day.record.row(table, layout, *seconds, max(row["actor/mismatch_max"] for row in taken))
