"""Every key of the training of a retriever, with its default and its meaning."""

from __future__ import annotations

from dataclasses import dataclass

from recipes.answers.options import chosen
from recipes.retrieval.encoders.base import EncoderSettings, Pooling
from rollout.keys import check, key


@dataclass(frozen=True)
class RetrieverConfig:
    """One run of `python -m recipes.train_retriever`."""

    name: str = key("retriever", "Name of the run; its folder is <output_dir>/<name>.")
    output_dir: str = key("runs", "Folder that holds run folders.")
    base_model: str = key("", "Folder or hub id: a vision-language or a sentence-transformers model that reads images.")
    revision: str = key("", 'Commit, branch or tag on the hub; "" takes the newest.')
    trust_remote_code: bool = key(False, "Run code that comes with the model.")
    pairs: str = key("", "Pairs of query and page: a file, a folder or a hub data set.")
    held_out: str = key("", 'Pairs to measure with, in the same forms; "" holds out some of pairs.')
    held_out_pairs: int = key(256, "Number of pairs held out, drawn by seed, where held_out is empty.", ge=0)
    pooling: Pooling = key("", 'How token vectors become one; "" is what the model\'s folder says, else weighted_mean.')
    query_prefix: str = key("Represent this query for retrieving relevant documents: ", "Text before every query.")
    min_pixels: int = key(4 * 28 * 28, "Smallest area of a page after the resize, in pixels.", ge=1)
    max_pixels: int = key(1_280 * 28 * 28, "Largest area of a page after the resize, in pixels.", ge=1)
    batch_size: int = key(128, "Pairs per rank; their pages are each other's negatives.", ge=2)
    micro_batch_size: int = key(4, "Pairs in memory at once; it does not change the gradient.", ge=1)
    temperature: float = key(0.02, "Temperature of the softmax over pages.", gt=0)
    mined_negatives: int = key(0, "Further negatives per query: the pages nearest to it by the initial model.", ge=0)
    total_steps: int = key(1000, "Steps to train.", ge=1)
    lr: float = key(1e-5, "Learning rate.", gt=0)
    weight_decay: float = key(0.0, "AdamW's decoupled weight decay.", ge=0)
    warmup_steps: int = key(100, "Steps over which the learning rate rises to lr.", ge=0)
    bf16: bool = key(False, "Compute in bfloat16.")
    gradient_checkpointing: bool = key(False, "Recompute activations in the backward pass to save memory.")
    freeze_vision: bool = key(False, "Keep the vision tower as it is.")
    lora_rank: int = key(0, "Rank of the adapters; 0 trains all weights.", ge=0)
    log_every: int = key(10, "Steps between logged metrics.", ge=1)
    eval_every: int = key(100, "Steps between measurements on held-out pairs.", ge=1)
    save_every: int = key(100, "Steps between checkpoints.", ge=1)
    keep_last: int = key(2, "Number of most recent checkpoints to keep.", ge=1)
    seed: int = key(0, "The single source of every random draw.", ge=0)
    num_threads: int = key(0, "CPU threads; 0 leaves the number to torch.", ge=0)

    def __post_init__(self) -> None:
        check(self)

    def encoder(self) -> EncoderSettings:
        """Return how the model is loaded."""
        return chosen(EncoderSettings, self, model=self.base_model, batch_size=self.micro_batch_size)
