"""What a user can set about images, prompts and sampling. Plain dataclasses; no engine is imported here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class InputsConfig:
    """How a prompt becomes tokens and pixels: one setting for engine, learner, SFT and inference.

    min_pixels, max_pixels: limits of an image's area after the resize.
    max_images: images a prompt may have.
    max_prompt_tokens: rendered prompt, vision tokens included.
    """

    min_pixels: int = 262_144
    max_pixels: int = 1_568_000
    max_images: int = 5
    max_prompt_tokens: int = 15_000


@dataclass
class RolloutConfig:
    """Sampling of training rollouts.

    engine: "hf" (embedded, transformers), "fake" (scripted) or "vllm".
    num_workers: engines, each a Ray actor.
    group_size: G, rollouts per prompt.
    max_response_tokens: end-of-text included.
    max_batch_sequences: sequences that the embedded engine decodes at once.
    dtype: of the embedded engine's weights, "float32" or "bfloat16".
    script: for engine "fake": a jsonl of {"id", "responses"}; empty answers every prompt with its gold response.
    timeout_s: the longest that one worker may take for one batch.
    allow_biased_sampling: permit top_p < 1 or top_k > 0 in training, which importance ratios do not correct.
    """

    engine: str = "hf"
    num_workers: int = 1
    group_size: int = 8
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_response_tokens: int = 1536
    max_batch_sequences: int = 128
    dtype: str = "float32"
    script: str = ""
    timeout_s: float = 3600.0
    allow_biased_sampling: bool = False
