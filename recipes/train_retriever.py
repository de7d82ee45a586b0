"""Train a visual retriever: `python -m recipes.train_retriever recipe=visrag pairs=my_pairs.jsonl`.

One process, or several by `torchrun --nproc-per-node N -m recipes.train_retriever ...`; in-batch negatives are then
those of all ranks. The settings are in `recipes.retrieval.training.config`, the training in `.loop` beside it.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

from recipes.retrieval.training.config import RetrieverConfig
from rollout.files import json_object, write_text
from rollout.keys import require
from rsgrpo import cli
from rsgrpo.errors import InputError
from rsgrpo.records.console import Console
from rsgrpo.records.secrets import masked

if TYPE_CHECKING:
    from recipes.retrieval.training.pairs import Pair


def main(config: RetrieverConfig) -> None:
    """Train one run, or resume it."""
    require(config.base_model != "", "base_model is empty; set it to a model folder or hub id")
    require(config.pairs != "", "pairs is empty; set it to a jsonl, a parquet file or folder, or a hub data set")
    try:
        import torch

        from recipes.retrieval.training.loop import train
        from recipes.retrieval.training.pairs import read_pairs
    except ModuleNotFoundError as error:
        install = 'install the extra, for example with `pip install -e ".[retrieval]"`'
        raise InputError(f"{error.name} is not installed; {install}") from error
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
    require(
        has_other_pages, f"all {len(pairs)} training pairs have the same page; add pairs of other pages to learn from"
    )
    _keep_settings(config, out)
    with Console() as console:
        metrics = train(config, pairs, held_out, out, console)
        rows = [("steps", str(config.total_steps)), ("pairs", str(len(pairs)))]
        rows += [(f"held-out {name}", f"{value:.4g}") for name, value in metrics.items()]
        console.summary("Trained", [*rows, ("model", str(out / "model"))])


def split(pairs: list[Pair], count: int, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Return training and held-out pairs without a common page; ConfigError if no training pair would be left."""
    by_page: dict[str | bytes, list[Pair]] = {}
    for pair in pairs:
        by_page.setdefault(pair.page, []).append(pair)
    pages = list(by_page)
    Random(seed).shuffle(pages)
    held: list[Pair] = []
    chosen: set[str | bytes] = set()
    for page in pages:
        if len(held) >= count:
            break
        chosen.add(page)
        held += by_page[page]
    rest = [pair for pair in pairs if pair.page not in chosen]
    whole = f"{len(pairs)} pairs (on {len(pages)} pages)"
    require(bool(rest), f"held_out_pairs {count} leaves no pair of {whole} to train on; lower it")
    return rest, held


def _keep_settings(config: RetrieverConfig, out: Path) -> None:
    """Write the settings into the run's folder; a run with other settings is not resumed.

    Raises:
        ConfigError: names what differs.
        InputError: the settings there are damaged.
    """
    file, settings = out / "settings.json", masked(asdict(config))
    if file.exists():
        before = json_object(file.read_bytes(), f"{file} is damaged")
        may_change = {"total_steps", "log_every", "eval_every", "keep_last", "num_threads", "micro_batch_size"}
        changed = [f"{n} {before.get(n)} -> {v}" for n, v in settings.items() if before.get(n) != v]
        fixed = [text for text in changed if text.partition(" ")[0] not in may_change]
        require(not fixed, f"{out} was started with other settings ({', '.join(fixed)}); choose another name")
    out.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(settings, indent=1) + "\n")


if __name__ == "__main__":
    cli.run(main, RetrieverConfig, "train_retriever")
