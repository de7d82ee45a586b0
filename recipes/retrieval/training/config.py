"""Every key of the training of a retriever, with its default and its meaning."""

from __future__ import annotations

from dataclasses import dataclass

from recipes.retrieval.encoders.base import EncoderSettings
from rsgrpo.config.limits import one_of, require


@dataclass(frozen=True)
class RetrieverConfig:
    """One run.

    name, output_dir: the run writes to OUTPUT_DIR/NAME.
    base_model: folder or hub id: a vision-language model, or a sentence-transformers model that reads images.
    revision: hub commit. trust_remote_code: run code that the model's folder brings.
    pairs, held_out: what `recipes.retrieval.training.pairs.read_pairs` reads; held_out may be "".
    held_out_pairs: without `held_out`, so many of `pairs` (drawn by `seed`) are held out instead; 0: none.
    pooling: weighted_mean, mean, last or cls; "" where the model's folder fixes it, else weighted_mean.
    query_prefix: instruction before every query. min_pixels, max_pixels: area of a resized page.
    batch_size: pairs per rank whose pages are each other's negatives. micro_batch_size: how many are in memory at once;
        it changes no gradient.
    temperature: of the softmax over pages. mined_negatives: pages per query, nearest by the model at the start.
    freeze_vision, lora_rank: what is trained; rank 0 is everything.
    """

    name: str = "retriever"
    output_dir: str = "runs"
    base_model: str = ""
    revision: str = ""
    trust_remote_code: bool = False
    pairs: str = ""
    held_out: str = ""
    held_out_pairs: int = 256
    pooling: str = ""
    query_prefix: str = "Represent this query for retrieving relevant documents: "
    min_pixels: int = 4 * 28 * 28
    max_pixels: int = 1_280 * 28 * 28
    batch_size: int = 128
    micro_batch_size: int = 4
    temperature: float = 0.02
    mined_negatives: int = 0
    total_steps: int = 1000
    lr: float = 1e-5
    weight_decay: float = 0.0
    warmup_steps: int = 100
    bf16: bool = False
    gradient_checkpointing: bool = False
    freeze_vision: bool = False
    lora_rank: int = 0
    log_every: int = 10
    eval_every: int = 100
    save_every: int = 100
    keep_last: int = 2
    seed: int = 0
    num_threads: int = 0

    def __post_init__(self) -> None:
        for name in ("micro_batch_size", "total_steps", "log_every", "eval_every", "save_every", "keep_last"):
            require(getattr(self, name) >= 1, f"{name} must be >= 1, got {getattr(self, name)}")
        for name in ("held_out_pairs", "mined_negatives", "lora_rank", "warmup_steps", "num_threads"):
            require(getattr(self, name) >= 0, f"{name} must be >= 0, got {getattr(self, name)}")
        require(self.batch_size >= 2, f"batch_size must be >= 2 to have negatives in the batch, got {self.batch_size}")
        require(self.temperature > 0, f"temperature must be > 0, got {self.temperature}")
        one_of("pooling", self.pooling, ("", "weighted_mean", "mean", "last", "cls"))

    def encoder(self) -> EncoderSettings:
        """Return how the model is loaded."""
        return EncoderSettings(
            self.base_model,
            pooling=self.pooling,
            query_prefix=self.query_prefix,
            min_pixels=self.min_pixels,
            max_pixels=self.max_pixels,
            batch_size=self.micro_batch_size,
            revision=self.revision,
            trust_remote_code=self.trust_remote_code,
        )
