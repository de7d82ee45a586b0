"""One model, one group, and the three ways of making a learner's step on it that benchmarks.learner compares."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from rsgrpo.algorithm.loss import SurrogateConfig, policy_loss, step_totals
from rsgrpo.learning.attention import choose_attention
from rsgrpo.learning.packing import EncodedPrompt, build_micro_batch
from rsgrpo.learning.passes import move
from rsgrpo.learning.policy import Policy, recompute
from rsgrpo.types import MicroBatch, Sample, TokenScores

VISION_START, VISION_END, IMAGE, VIDEO = 2, 3, 4, 5
BANNED = [VISION_START, VISION_END, IMAGE, VIDEO]
SPECIAL_IDS = {
    "<|vision_start|>": VISION_START, "<|vision_end|>": VISION_END, "<|image_pad|>": IMAGE, "<|video_pad|>": VIDEO
}  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """A model's sizes. A small one keeps the real one's proportions of layers, tower, and vocabulary to hidden size.

    Of Qwen3.5, heads attend in a width of 1/heads of the hidden size; the delta rule has twice as many value heads, as
    many key heads, and half that width each.
    """

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
    logits_chunk: int = 512  # response tokens whose logits exist at once
    family: str = "qwen2_5_vl"
    patch: int = 14


SHAPES = {
    "small": Shape(256, 8, 4, 1, 1024, 10_752, False, 128, 4, 4, 344, logits_chunk=51),
    "3b": Shape(2048, 36, 16, 2, 11008, 151_936, True, 1280, 32, 16, 3420),
    "7b": Shape(3584, 28, 28, 4, 18944, 152_064, False, 1280, 32, 16, 3420),
}
QWEN35 = {
    "small": Shape(256, 8, 4, 1, 768, 15_520, False, 64, 4, 4, 240, logits_chunk=51, family="qwen3_5", patch=16),
    "9b": Shape(4096, 32, 16, 4, 12288, 248_320, False, 1152, 27, 16, 4304, family="qwen3_5", patch=16),
}
FAMILIES = {"qwen2_5_vl": SHAPES, "qwen3_5": QWEN35}


@dataclass(frozen=True)
class Work:
    """One group: tokens of the prompt (images included), tokens of each response, responses, images of a size."""

    prompt: int
    response: int
    group: int
    images: int
    image_tokens: int


# The small work is a tenth of the real one in every length (and so is its chunk of logits).
REAL = Work(11_000, 700, 8, 5, 2000)
WORK = {"small": Work(1100, 70, 8, 5, 200), "3b": REAL, "7b": REAL, "9b": REAL}


@dataclass
class Batch:
    """The group as tensors on the device."""

    prompt_ids: torch.Tensor
    pixels: torch.Tensor | None
    grid: torch.Tensor | None
    samples: list[Sample]


def build_model(
    shape: Shape, device: torch.device, dtype: torch.dtype, token_ids: Mapping[str, int] | None = None
) -> Any:
    """Return a randomly initialised model with a frozen tower.

    token_ids: of a tokenizer's special tokens, by their text; None takes small numbers and has no end of text.
    """
    ids = token_ids or SPECIAL_IDS
    pairs = shape.hidden // shape.heads // 2
    side = 3 * pairs // 8
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [pairs - 2 * side, side, side]}
    text, vision = _qwen3_5(shape, rope) if shape.family == "qwen3_5" else _qwen2_5_vl(shape, rope)
    config = AutoConfig.for_model(
        shape.family,
        text_config={
            "vocab_size": shape.vocab,
            "hidden_size": shape.hidden,
            "intermediate_size": shape.intermediate,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "max_position_embeddings": 128_000,
            "tie_word_embeddings": shape.tied,
            "bos_token_id": None,
            "eos_token_id": ids.get("<|im_end|>"),
            "pad_token_id": ids.get("<|endoftext|>"),
            **text,
        },
        vision_config={
            "depth": shape.vision_depth,
            "hidden_size": shape.vision_hidden,
            "intermediate_size": shape.vision_intermediate,
            "num_heads": shape.vision_heads,
            "out_hidden_size": shape.hidden,
            **vision,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=shape.tied,
    )
    torch.manual_seed(0)
    with torch.device(device):
        from_config: Any = AutoModelForImageTextToText.from_config
        model = from_config(config, dtype=dtype, attn_implementation="sdpa")
    model.model.visual.requires_grad_(False)
    return model.train()


def _qwen2_5_vl(shape: Shape, rope: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    every = shape.vision_depth // 4
    full = list(range(every - 1, shape.vision_depth, every))
    return {"rope_parameters": rope, "use_sliding_window": False}, {"fullatt_block_indexes": full}


def _qwen3_5(shape: Shape, rope: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    head_dim = shape.hidden // shape.heads
    text = {
        "rope_parameters": {**rope, "mrope_interleaved": True, "partial_rotary_factor": 1.0},
        "head_dim": head_dim,
        "linear_num_key_heads": shape.heads,
        "linear_num_value_heads": 2 * shape.heads,
        "linear_key_head_dim": head_dim // 2,
        "linear_value_head_dim": head_dim // 2,
    }
    return text, {"patch_size": shape.patch, "num_position_embeddings": 2304}


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
        torch.randn(int(grid.prod(1).sum()), 3 * 2 * shape.patch**2, generator=generator).to(device)
        if work.images
        else None,
        grid.to(device) if work.images else None,
        samples,
    )


class Bench:
    """One model and one group; every side is a method that leaves gradients and returns the loss."""

    def __init__(
        self,
        shape: Shape,
        work: Work,
        device: torch.device,
        dtype: torch.dtype,
        *,
        attention: str = "auto",
        checkpointing: str = "full",
        compiled: bool = False,
    ) -> None:
        self.shape, self.device = shape, device
        self.model = build_model(shape, device, dtype)
        self.policy = Policy(
            self.model,
            banned_token_ids=BANNED,
            attention=choose_attention(attention, device, dtype),
            logits_chunk_tokens=shape.logits_chunk,
            frozen_tower=True,
            compute_dtype=dtype,
        ).to(device)
        recompute(self.policy, checkpointing)
        if compiled:
            for layer in self.policy.family.decoder_layers(self.model):
                layer.compile(dynamic=True)
        self.change(work)

    def change(self, work: Work) -> None:
        """Take another group."""
        self.work, self.batch = work, build_batch(work, self.shape, self.device)
        self._totals = step_totals(self.batch.samples, [1.0, 1.0], self.device)

    def _features(self) -> torch.Tensor | None:
        if self.batch.pixels is None or self.batch.grid is None:
            return None
        return self.policy.encode_images(self.batch.pixels, self.batch.grid)

    def _prompt(self, features: torch.Tensor | None) -> EncodedPrompt:
        positions = self.policy.family.position_ids(self.model, self.batch.prompt_ids[None], self.batch.grid)[:, 0]
        return EncodedPrompt(self.batch.prompt_ids.cpu(), positions.cpu(), () if features is None else (features,))

    def _row(self, prompt: EncodedPrompt, samples: list[Sample]) -> MicroBatch:
        return move(build_micro_batch([(prompt, samples)]), self.device)

    def _backward(self, scores: TokenScores, row: MicroBatch) -> float:
        loss = policy_loss(scores, row, totals=self._totals, config=SurrogateConfig()).loss
        torch.autograd.backward(loss)
        return float(loss.detach())

    def ours(self) -> float:
        """One row for the group."""
        row = self._row(self._prompt(self._features()), self.batch.samples)
        return self._backward(self.policy(row, 1.0, False), row)

    def best(self) -> float:
        """One row per response, each with its prompt; nothing else is done twice."""
        prompt = self._prompt(self._features())
        total = 0.0
        for sample in self.batch.samples:
            row = self._row(prompt, [sample])
            total += self._backward(self.policy(row, 1.0, False), row)
        return total

    def plain(self) -> float:
        """Transformers' forward for every response, in an old-logprob pass and in the training pass."""
        config = self.model.model.language_model.config
        ours, config._attn_implementation = config._attn_implementation, "sdpa"
        prompt = self._prompt(None)
        total = 0.0
        for sample in self.batch.samples:
            row = self._row(prompt, [sample])
            with torch.no_grad():
                old_N = self._all_logits(sample).logprobs_N
            total += self._backward(self._all_logits(sample), replace(row, old_logprobs_N=old_N))
        config._attn_implementation = ours
        return total

    def _all_logits(self, sample: Sample) -> TokenScores:
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
        start = -len(response)
        unknown = torch.zeros_like(response, dtype=torch.bool)  # the plain side does not look for top tokens
        return TokenScores(logprobs_T[start:], entropy_T[start:], unknown.float(), unknown)

    def gradients(self, side: Callable[[], float]) -> tuple[float, dict[str, torch.Tensor]]:
        """Return a side's loss and its gradients, as they are on the device."""
        self.model.zero_grad(set_to_none=True)
        loss = side()
        found = {n: p.grad for n, p in self.model.named_parameters() if p.grad is not None}
        self.model.zero_grad(set_to_none=True)  # forgets them, so that nothing writes into what is returned
        return loss, found
