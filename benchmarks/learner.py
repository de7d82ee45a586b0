"""The learner's step against plain ones: same weights, same batch, gradients checked equal, in one run.

    python benchmarks/learner.py                                  # small width on CPU, minutes
    python benchmarks/learner.py --sweep                          # growth with prompt, group and images
    python benchmarks/learner.py --device cuda --size 7b          # Qwen2.5-VL-7B's shape, random weights

Needs torch and transformers only. A step is forward and backward over one group; three sides make it:

    plain   one row per response, the tower in every row of both passes, an old-logprob pass, logits of every token
    best    one row per response, but features once, no old pass, logits of response tokens only, in chunks
    ours    one row per group: prompt, tower and head as in rsgrpo.model

No optimiser and no sharding: both are the same for all sides.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import sys
import time
import weakref
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from rsgrpo.attention import choose_attention
from rsgrpo.loss import policy_loss, step_totals
from rsgrpo.model import Policy
from rsgrpo.packing import EncodedPrompt, build_micro_batch
from rsgrpo.passes import cost_model, move
from rsgrpo.types import Sample

VISION_START, VISION_END, IMAGE, VIDEO = 2, 3, 4, 5
SIDES = ("plain", "best", "ours")
BANNED = [VISION_START, VISION_END, IMAGE, VIDEO]


@dataclass(frozen=True)
class Shape:
    """A model's sizes. The small one keeps a 7B model's proportions of layers, head and tower."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int
    tied: bool
    vision_hidden: int
    vision_depth: int
    vision_heads: int
    vision_intermediate: int


SHAPES = {
    "small": Shape(256, 8, 4, 1, 1024, 4096, False, 128, 4, 4, 344),
    "3b": Shape(2048, 36, 16, 2, 11008, 151_936, True, 1280, 32, 16, 3420),
    "7b": Shape(3584, 28, 28, 4, 18944, 152_064, False, 1280, 32, 16, 3420),
}


@dataclass(frozen=True)
class Work:
    """One group: tokens of the prompt (images included), tokens of each response, responses, images of a size."""

    prompt: int
    response: int
    group: int
    images: int
    image_tokens: int


WORK = {"small": Work(1100, 70, 8, 5, 200), "3b": Work(11_000, 700, 8, 5, 2000), "7b": Work(11_000, 700, 8, 5, 2000)}


@dataclass
class Batch:
    """The group as tensors on the device."""

    prompt_ids: torch.Tensor
    pixels: torch.Tensor | None
    grid: torch.Tensor | None
    samples: list[Sample]


def build_model(shape: Shape, device: torch.device, dtype: torch.dtype) -> Any:
    """Return a randomly initialised Qwen2.5-VL with a frozen tower and gradient checkpointing."""
    pairs = shape.hidden // shape.heads // 2
    side = 3 * pairs // 8
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": shape.vocab,
            "hidden_size": shape.hidden,
            "intermediate_size": shape.intermediate,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "max_position_embeddings": 128_000,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [pairs - 2 * side, side, side],
            },
            "use_sliding_window": False,
            "tie_word_embeddings": shape.tied,
            "bos_token_id": None,
            "eos_token_id": None,
        },
        vision_config={
            "depth": shape.vision_depth,
            "hidden_size": shape.vision_hidden,
            "intermediate_size": shape.vision_intermediate,
            "num_heads": shape.vision_heads,
            "out_hidden_size": shape.hidden,
            "fullatt_block_indexes": list(
                range(shape.vision_depth // 4 - 1, shape.vision_depth, shape.vision_depth // 4)
            ),
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        tie_word_embeddings=shape.tied,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=dtype, attn_implementation="sdpa")
    model.model.visual.requires_grad_(False)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def build_batch(work: Work, shape: Shape, device: torch.device) -> Batch:
    """Return a random group whose images are `image_tokens` merged tokens each."""
    generator = torch.Generator().manual_seed(1)
    height = max(h for h in range(1, int(work.image_tokens**0.5) + 1) if work.image_tokens % h == 0)
    grid = torch.tensor([[1, 2 * height, 2 * work.image_tokens // height]] * work.images).reshape(-1, 3)
    image = [VISION_START, *[IMAGE] * work.image_tokens, VISION_END]
    num_text = work.prompt - work.images * len(image)
    if num_text < 1:
        raise SystemExit(f"--prompt {work.prompt} is too short for {work.images} images of {len(image)} tokens")
    text = torch.randint(10, shape.vocab, (num_text,), generator=generator).tolist()
    rng = np.random.default_rng(2)
    samples = []
    for _ in range(work.group):
        whole = np.ones((2, work.response), dtype=bool)
        whole[0, : work.response // 2] = False  # two rewards on two scopes
        advantages = (whole * rng.normal(size=(2, 1))).astype(np.float32)
        samples.append(Sample(rng.integers(10, shape.vocab, work.response), whole, advantages))
    return Batch(
        torch.tensor([*text[:1], *image * work.images, *text[1:]], device=device),
        torch.randn(int(grid.prod(1).sum()), 3 * 2 * 14 * 14, generator=generator).to(device) if work.images else None,
        grid.to(device) if work.images else None,
        samples,
    )


class Bench:
    """One model and one group; every side is a method that leaves gradients and returns the loss."""

    def __init__(self, shape: Shape, work: Work, device: torch.device, dtype: torch.dtype, attention: str) -> None:
        self.shape, self.device = shape, device
        self.model = build_model(shape, device, dtype)
        self.policy = Policy(
            self.model,
            banned_token_ids=BANNED,
            attention=choose_attention(attention, device, dtype),
            logits_chunk_tokens=2048,
            frozen_tower=True,
            compute_dtype=dtype,
        ).to(device)
        self.change(work)

    def change(self, work: Work) -> None:
        """Take another group."""
        self.work, self.batch = work, build_batch(work, self.shape, self.device)
        device = self.device
        totals = step_totals(self.batch.samples)
        self._loss_options: dict[str, Any] = {
            "rollout_logprobs_N": None,
            "ref_logprobs_N": None,
            "loss_weights_K": torch.ones(2, device=device),
            "scope_tokens_K": torch.tensor(totals.scope_tokens_K, dtype=torch.float32, device=device),
            "active_K": torch.tensor(totals.active_K, device=device),
            "response_tokens": totals.response_tokens,
        }

    def _features(self) -> torch.Tensor | None:
        if self.batch.pixels is None or self.batch.grid is None:
            return None
        return self.policy.encode_images(self.batch.pixels, self.batch.grid)

    def _prompt(self, features: torch.Tensor | None) -> EncodedPrompt:
        positions = self.policy.family.position_ids(self.model, self.batch.prompt_ids, self.batch.grid)
        return EncodedPrompt(self.batch.prompt_ids.cpu(), positions.cpu(), features)

    def _loss(self, logprobs_N: torch.Tensor, entropy_N: torch.Tensor, old_N: Any, samples: list[Sample]) -> Any:
        return policy_loss(
            logprobs_N,
            entropy_N,
            old_logprobs_N=old_N,
            advantages_KN=torch.from_numpy(np.concatenate([s.advantages_KT for s in samples], 1)).to(self.device),
            scope_KN=torch.from_numpy(np.concatenate([s.scope_KT for s in samples], 1)).to(self.device),
            sample_index_N=torch.zeros(len(logprobs_N), dtype=torch.int64, device=self.device),
            **self._loss_options,
        ).loss

    def ours(self) -> float:
        """One row for the group."""
        prompt = self._prompt(self._features())
        row = move(build_micro_batch([(prompt, self.batch.samples)]), self.device)
        logprobs, entropy = self.policy(row, 1.0, False)
        loss = self._loss(logprobs, entropy, None, self.batch.samples)
        loss.backward()
        return float(loss.detach())

    def best(self) -> float:
        """One row per response, each with its prompt; nothing else is done twice."""
        prompt = self._prompt(self._features())
        total = 0.0
        for sample in self.batch.samples:
            row = move(build_micro_batch([(prompt, [sample])]), self.device)
            logprobs, entropy = self.policy(row, 1.0, False)
            loss = self._loss(logprobs, entropy, None, [sample])
            loss.backward()
            total += float(loss.detach())
        return total

    def plain(self) -> float:
        """transformers' forward for every response, in an old-logprob pass and in the training pass."""
        config = self.model.model.language_model.config
        ours, config._attn_implementation = config._attn_implementation, "sdpa"
        total = 0.0
        for sample in self.batch.samples:
            with torch.no_grad():
                old, _ = self._all_logits(sample)
            logprobs, entropy = self._all_logits(sample)
            loss = self._loss(logprobs, entropy, old, [sample])
            loss.backward()
            total += float(loss.detach())
        config._attn_implementation = ours
        return total

    def _all_logits(self, sample: Sample) -> tuple[torch.Tensor, torch.Tensor]:
        response = torch.from_numpy(sample.token_ids_T).to(self.device)
        tokens = torch.cat([self.batch.prompt_ids, response])[None]
        logits = self.model(
            input_ids=tokens,
            pixel_values=self.batch.pixels,
            image_grid_thw=self.batch.grid,
            mm_token_type_ids=(tokens == IMAGE).int(),
            use_cache=False,
        ).logits[0, :-1]
        logprobs_TV = torch.log_softmax(logits.float().masked_fill(self.policy.banned_V, float("-inf")), -1)
        logprobs_T = logprobs_TV.gather(-1, tokens[0, 1:, None])[:, 0]
        with torch.no_grad():
            entropy_T = -(logprobs_TV.exp() * logprobs_TV.masked_fill(self.policy.banned_V, 0.0)).sum(-1)
        return logprobs_T[-len(response) :], entropy_T[-len(response) :]

    def gradients(self, side: Callable[[], float]) -> tuple[float, dict[str, torch.Tensor]]:
        """Return a side's loss and its gradients, on CPU."""
        self.model.zero_grad(set_to_none=True)
        loss = side()
        found = {n: p.grad.float().cpu() for n, p in self.model.named_parameters() if p.grad is not None}
        self.model.zero_grad(set_to_none=True)
        return loss, found


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
    gc.collect()
    peak = PeakTensors(bench.model)
    with counter, peak:
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


def time_sides(bench: Bench, repeats: int) -> dict[str, float]:
    """Return each side's seconds, best of `repeats`, in turns so that a busy moment hits all sides alike."""
    best = dict.fromkeys(SIDES, float("inf"))
    for _ in range(repeats):
        for name in SIDES:
            start = clock(bench.device)
            getattr(bench, name)()
            best[name] = min(best[name], clock(bench.device) - start)
            bench.model.zero_grad(set_to_none=True)
    return best


def check_equal(bench: Bench) -> dict[str, float]:
    """Return the largest relative differences of gradients (over parameters) and of losses between the sides."""
    loss, reference = bench.gradients(bench.ours)
    report = {}
    for name in ("plain", "best"):
        other_loss, other = bench.gradients(getattr(bench, name))
        assert other.keys() == reference.keys()
        report[f"gradients ours/{name}"] = max(
            float((reference[n] - other[n]).norm() / (other[n].norm() + 1e-12)) for n in other
        )
        report[f"loss ours/{name}"] = abs(loss - other_loss) / (abs(other_loss) + 1e-12)
    return report


def peak_matmul_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """Return the measured rate of a large matrix product."""
    size = 8192 if device.type == "cuda" else 1024
    one, other = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(8):
        start = clock(device)
        one @ other
        best = min(best, clock(device) - start)
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
            row |= time_sides(bench, repeats)
            found.setdefault(name, []).append(row)
            ratios = f"{row['plain'] / row['ours']:.1f} | {row['best'] / row['ours']:.1f}"
            print(
                f"| {row[name]:.0f} | {row['plain']:.2f} | {row['best']:.2f} | {row['ours']:.2f} | {ratios} |",
                flush=True,
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--size", choices=list(SHAPES), default="small")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: float32 on CPU, bfloat16 on CUDA")
    parser.add_argument("--attention", choices=["auto", "sdpa", "flash"], default="auto")
    parser.add_argument("--prompt", type=int, help="prompt tokens, images included")
    parser.add_argument("--response", type=int, help="tokens of each response")
    parser.add_argument("--group", type=int, help="responses")
    parser.add_argument("--images", type=int)
    parser.add_argument("--image-tokens", type=int, dest="image_tokens")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves it to torch")
    parser.add_argument("--sweep", action="store_true", help="seconds against prompt, group and images instead")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    dtype = getattr(torch, args.dtype or ("bfloat16" if args.device == "cuda" else "float32"))
    changes = {key: value for key in asdict(WORK["small"]) if (value := getattr(args, key)) is not None}
    work = replace(WORK[args.size], **changes)
    name = torch.cuda.get_device_name() if args.device == "cuda" else f"{torch.get_num_threads()} CPU thread(s)"
    print(f"torch {torch.__version__}, {name}, {platform.machine()}, {dtype}, {args.size}: {work}", flush=True)
    bench = Bench(SHAPES[args.size], work, device, dtype, args.attention)
    num_parameters = sum(parameter.numel() for parameter in bench.model.parameters())
    print(f"{num_parameters / 1e6:,.1f} M parameters, attention {bench.policy.attention}", flush=True)
    results: Any
    if args.sweep:
        results = sweep(bench, args.repeats)
    else:
        equal = check_equal(bench)
        print("; ".join(f"{key} {value:.1e}" for key, value in equal.items()), flush=True)
        seconds = time_sides(bench, args.repeats)
        results = {side: {**count(bench, getattr(bench, side)), "seconds": seconds[side]} for side in SIDES}
        report_sides(results, bench, dtype)
    if args.json:
        args.json.write_text(json.dumps({"work": asdict(work), "size": args.size, "results": results}, indent=2))


if __name__ == "__main__":
    main()
