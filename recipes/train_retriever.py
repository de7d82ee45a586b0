"""Train a visual retriever: `python -m recipes.train_retriever recipe=visrag pairs=my_pairs.jsonl`.

One process, or several by `torchrun --nproc-per-node N -m recipes.train_retriever ...`; in-batch negatives are then
those of all ranks. Owns the settings; the training itself is `recipes.retrieval.training`.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

from rsgrpo import cli
from rsgrpo.console import Console
from rsgrpo.errors import InputError
from rsgrpo.limits import one_of, require

if TYPE_CHECKING:
    from recipes.retrieval.encoders import EncoderSettings
    from recipes.retrieval.pairs import Pair


@dataclass(frozen=True)
class RetrieverConfig:
    """One run.

    name, output_dir: the run writes to OUTPUT_DIR/NAME.
    base_model: folder or hub id: a vision-language model, or a sentence-transformers model that reads images.
    revision: hub commit. trust_remote_code: run code that the model's folder brings.
    pairs, held_out: what `recipes.retrieval.pairs.read_pairs` reads; held_out may be "".
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
        from recipes.retrieval.encoders import EncoderSettings

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


def main(config: RetrieverConfig) -> None:
    """Train one run, or go on with it."""
    require(config.base_model != "", "base_model is empty: name a model folder or hub id")
    require(config.pairs != "", "pairs is empty: name a jsonl, a parquet file or folder, or a hub data set")
    try:
        import torch

        from recipes.retrieval.pairs import read_pairs
        from recipes.retrieval.training import train
    except ModuleNotFoundError as error:
        raise InputError(f'{error.name} is not installed; pip install "rsgrpo[retrieval]"') from error
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    out = Path(config.output_dir) / config.name
    pairs = read_pairs(config.pairs)
    held_out = read_pairs(config.held_out) if config.held_out else []
    if not config.held_out and config.held_out_pairs:
        pairs, held_out = split(pairs, config.held_out_pairs, config.seed)
    require(
        len(pairs) >= config.batch_size,
        f"batch_size {config.batch_size} is more than the {len(pairs)} training pairs; lower it or hold out fewer",
    )
    has_other_pages = any(pair.page != pairs[0].page or pair.negatives for pair in pairs)
    require(has_other_pages, f"all {len(pairs)} training pairs have the same page: there is no other to tell it from")
    _keep_settings(config, out)
    with Console() as console:
        metrics = train(config, pairs, held_out, out, console)
        rows = [("steps", str(config.total_steps)), ("pairs", str(len(pairs)))]
        rows += [(f"held-out {name}", f"{value:.4g}") for name, value in metrics.items()]
        console.summary("Trained", [*rows, ("model", str(out / "model"))])


def split(pairs: list[Pair], count: int, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Return training and held-out pairs that share no page.

    Raises:
        ConfigError: nothing would be left.
    """
    pages = list(dict.fromkeys(pair.page for pair in pairs))
    Random(seed).shuffle(pages)
    chosen: set[str | bytes] = set()
    held: list[Pair] = []
    by_page: dict[str | bytes, list[Pair]] = {}
    for pair in pairs:
        by_page.setdefault(pair.page, []).append(pair)
    for page in pages:
        if len(held) >= count:
            break
        chosen.add(page)
        held += by_page[page]
    rest = [pair for pair in pairs if pair.page not in chosen]
    left = f"held_out_pairs {count} leaves nothing of {len(pairs)} pairs (on {len(pages)} pages) to train on; lower it"
    require(bool(rest), left)
    return rest, held


def _keep_settings(config: RetrieverConfig, out: Path) -> None:
    """Write the settings beside the run; a run of other settings is not continued.

    Raises:
        ConfigError: names what differs.
    """
    file, settings = out / "settings.json", asdict(config)
    if file.exists():
        before = json.loads(file.read_text())
        may_change = {"total_steps", "log_every", "eval_every", "keep_last", "num_threads", "micro_batch_size"}
        changed = [f"{n} {before.get(n)} -> {v}" for n, v in settings.items() if before.get(n) != v]
        fixed = [text for text in changed if text.partition(" ")[0] not in may_change]
        require(not fixed, f"{out} was begun with other settings ({', '.join(fixed)}); choose another name")
    out.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(settings, indent=1) + "\n")


if __name__ == "__main__":
    cli.run(main, RetrieverConfig, "train_retriever")
