"""Sampling speed of vLLM, of vLLM given each group as separate prompts, and of the embedded engine; sync seconds.

The same model, prompts and thread count for all; every measurement runs in processes of its own.

    python -m benchmarks.rollout                     # a random Qwen2.5-VL of a few million parameters
    python -m benchmarks.rollout --model FOLDER      # your own model (no sync sizes)
"""

from __future__ import annotations

import argparse
import multiprocessing as mp
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from recipes.demo.model import build_model, save_model_folder, train_tokenizer
from rollout.config import EngineKind, InputsConfig, RolloutConfig, VllmConfig
from rollout.types import Prompt, SamplingParams

WORDS = ["page", "1", "2", "shows", "a", "code", "4", "and", "an", "amount", "7", "what", "is", "on", "no", "answer"]
HIDDEN_SIZES = (128, 512, 1024)
INPUTS = InputsConfig(min_pixels=28 * 28, max_pixels=28 * 28 * 64, max_images=5, max_prompt_tokens=3000)


def make_model(folder: Path, hidden_size: int) -> str:
    """Write a random model of 4 layers and return its folder."""
    tokenizer = train_tokenizer([" ".join(WORDS)] * 20, vocab_size=400)
    model = build_model(
        tokenizer, hidden_size=hidden_size, num_heads=hidden_size // 32, num_kv_heads=hidden_size // 64, init_std=0.02
    )
    save_model_folder(model, tokenizer, folder)
    return str(folder)


def make_prompts(folder: Path, num_prompts: int, num_words: int, num_images: int) -> list[Prompt]:
    """Return prompts of random words and noise pages; no two begin alike."""
    rng = np.random.default_rng(0)
    pages = []
    for index in range(num_images * num_prompts):
        path = folder / f"page{index}.png"
        Image.fromarray(rng.integers(0, 255, (224, 168, 3), dtype=np.uint8)).save(path)
        pages.append(str(path))
    return [
        Prompt(
            id=f"prompt{index}",
            text=f"{index} " + "<image>" * num_images + " ".join(rng.choice(WORDS, num_words)),
            images=tuple(pages[index * num_images : (index + 1) * num_images]),
        )
        for index in range(num_prompts)
    ]


def measure_sampling(
    engine_name: EngineKind,
    separate: bool,
    caching: bool,
    model_path: str,
    prompts: list[Prompt],
    sampling: SamplingParams,
    threads: int,
) -> dict[str, float]:
    """Return tokens/s, seconds, prefix-cache hit rate and memory of one engine on all prompts."""
    from rollout.build import build_engine

    config = RolloutConfig(
        engine=engine_name,
        max_response_tokens=sampling.max_tokens,
        max_batch_sequences=64,
        num_threads=threads,
        vllm=VllmConfig(
            kv_cache_gib=0.5,
            engine_args={"max_num_seqs": 64, "mm_processor_cache_gb": 0.5, "enable_prefix_caching": caching},
        ),
    )
    started = time.perf_counter()
    engine = build_engine(model_path, config, INPUTS, num_threads=threads)
    start_s = time.perf_counter() - started
    warm_up = Prompt("warm-up", "what amount ?")
    list(engine.generate([warm_up], SamplingParams(max_tokens=4)))
    engine.stats()  # counts start here
    if separate:
        prompts = [
            Prompt(f"{prompt.id}-{copy}", prompt.text, prompt.images)
            for prompt in prompts
            for copy in range(sampling.group_size)
        ]
        sampling = SamplingParams(temperature=sampling.temperature, max_tokens=sampling.max_tokens, seed=sampling.seed)
    started = time.perf_counter()
    groups = list(engine.generate(prompts, sampling))
    seconds = time.perf_counter() - started
    assert all(group.error is None for group in groups), next(group.error for group in groups if group.error)
    num_tokens = sum(len(rollout.token_ids_T) for group in groups for rollout in group.rollouts)
    stats = engine.stats()
    result = {
        "start_s": start_s,
        "seconds": seconds,
        "tokens_per_s": num_tokens / seconds,
        "hit_rate": stats.get("prefix_cache_hit_rate", float("nan")),
        "prompt_tokens": groups[0].num_prompt_tokens,
        "memory_mib": memory_mib(),
    }
    engine.close()
    return result


def measure_sync(model_path: str) -> dict[str, float]:
    """Return seconds of a weight sync within one process and over gloo."""
    import torch
    from transformers import AutoModelForImageTextToText

    from rollout.build import build_engine
    from rollout.vllm.peers import local_peer
    from rollout.vllm.weights_out import build_sender

    config = RolloutConfig(
        engine="vllm", max_response_tokens=8, vllm=VllmConfig(kv_cache_gib=0.125, engine_args={"max_num_seqs": 8})
    )
    engine = build_engine(model_path, config, INPUTS)
    model = AutoModelForImageTextToText.from_pretrained(model_path, dtype=torch.float32)
    seconds = {"parameters": float(sum(parameter.numel() for parameter in model.parameters()))}
    for version in range(2):  # the second is timed
        started = time.perf_counter()
        engine.load_weights(model.named_parameters())
        engine.finish_weights(version)
        seconds["load_weights_s"] = time.perf_counter() - started
    for key, verify_every in (("gloo_s", 0), ("gloo_checked_s", 1)):
        sender = build_sender([local_peer(engine)], backend=engine.backend, verify_every=verify_every)
        for version in range(2):
            started = time.perf_counter()
            sender.send(model.named_parameters(), version)
            seconds[key] = time.perf_counter() - started
        sender.close()
    engine.close()
    return seconds


def memory_mib() -> float:
    """Return the peak resident memory of this process and its descendants; 0 where /proc does not say."""
    total = 0
    waiting = [mp.current_process().pid]
    while waiting:
        folder = Path(f"/proc/{waiting.pop()}")
        if not folder.exists():
            continue
        status = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
        total += int(status.get("VmHWM", "0 kB").split()[0])
        waiting += [int(pid) for task in (folder / "task").iterdir() for pid in (task / "children").read_text().split()]
    return total / 1024


def alone(function: Callable[..., dict[str, float]], *args: Any) -> dict[str, float]:
    """Run a measurement in a fresh process."""
    context = mp.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_send_result, args=(theirs, function, args))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        raise RuntimeError(f"{function.__name__}{args[:2]} ended without a result; its error is above") from None
    finally:
        process.join()


def _send_result(connection: Any, function: Callable[..., dict[str, float]], args: tuple[Any, ...]) -> None:
    connection.send(function(*args))


def main() -> None:
    """Measure and print two Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="model folder; empty makes a random one")
    parser.add_argument("--hidden", type=int, default=256, help="hidden size of the random model")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--words", type=int, default=300, help="words of a prompt")
    parser.add_argument("--images", type=int, default=3, help="pages of a prompt, 48 vision tokens each")
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64, help="longest response")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=("sampling", "sync"), help="measure one of the two")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.only != "sync":
            model_path = options.model or make_model(folder / "model", options.hidden)
            prompts = make_prompts(folder, options.prompts, options.words, options.images)
            sampling = SamplingParams(group_size=options.group, max_tokens=options.tokens)
            rows = {
                "vLLM, groups": ("vllm", False, True),
                f"vLLM, {options.group} separate prompts": ("vllm", True, True),
                f"vLLM, {options.group} separate prompts, no prefix cache": ("vllm", True, False),
                "embedded (hf)": ("hf", False, True),
            }
            print("| engine | tokens/s | seconds | prefix-cache hits | peak memory MiB | start s |")
            print("|---|---|---|---|---|---|")
            for label, how in rows.items():
                row = alone(measure_sampling, *how, model_path, prompts, sampling, options.threads)
                hits = "" if row["hit_rate"] != row["hit_rate"] else f"{row['hit_rate']:.1%}"
                print(
                    f"| {label} | {row['tokens_per_s']:,.0f} | {row['seconds']:.1f} | {hits} "
                    f"| {row['memory_mib']:,.0f} | {row['start_s']:.0f} |",
                    flush=True,
                )
            print(f"\nPrompt tokens: {row['prompt_tokens']}.\n")
        if options.only != "sampling" and not options.model:
            print("| parameters | in process s | gloo s | gloo with checksums s |")
            print("|---|---|---|---|")
            for size in HIDDEN_SIZES:
                row = alone(measure_sync, make_model(folder / f"model{size}", size))
                print(
                    f"| {row['parameters'] / 1e6:.1f} M | {row['load_weights_s']:.2f} | {row['gloo_s']:.2f} "
                    f"| {row['gloo_checked_s']:.2f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
