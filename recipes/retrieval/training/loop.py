"""Contrastive training of a single-vector retriever, by sentence-transformers' trainer and gradient caching."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.base.evaluation.evaluator import BaseEvaluator
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
from sentence_transformers.util import all_gather, all_gather_with_grad
from transformers import PrinterCallback, TrainerCallback

from recipes.retrieval.encoders.base import RETRIEVER_FILE, EncoderSettings, ModelIdentity, identify
from recipes.retrieval.encoders.sentence import load_sentence_transformer
from recipes.retrieval.search.exact import rank
from recipes.retrieval.training.config import RetrieverConfig
from recipes.retrieval.training.pairs import Pair
from rollout.files import write_text
from rollout.inputs.images import PromptError, decode
from rsgrpo.errors import InputError, RsgrpoError
from rsgrpo.records.console import Console, short
from rsgrpo.records.tracking import cut_metrics_after

NDCG_AT = 10
SHOWN = {
    "loss": "loss", "in_batch_accuracy": "acc", "grad_norm": "grad",
    f"eval_ndcg@{NDCG_AT}": f"held-out ndcg@{NDCG_AT}", "eval_recall@1": "recall@1",
}  # fmt: skip
VISION = "visual"  # part of the names of a vision tower's parameters


class InBatchLoss(CachedMultipleNegativesRankingLoss):
    """InfoNCE over the batches of all ranks, with cached gradients; keeps the share of queries whose page won.

    The gradient is that of the whole batch: the size of a micro-batch does not change it. A page that occurs several
    times in the batch is not a negative of its own queries: labels are page numbers, (B, 1 + negatives) int64.
    """

    accuracy = float("nan")

    def calculate_loss(
        self, reps: list[list[torch.Tensor]], labels: torch.Tensor | None = None, *, with_backward: bool = False
    ) -> torch.Tensor:
        """Return the mean over this rank's queries of -log softmax of the own page's score among all pages.

        Args:
            reps: queries, pages and negatives, each as embeddings of consecutive micro-batches.
            labels: the pages' numbers.
            with_backward: also add to the embeddings' gradients.
        """
        assert labels is not None, "the loss needs the pages' numbers"
        queries_BD, pages = torch.cat(reps[0]), [torch.cat(column) for column in reps[1:]]
        numbers, first = labels, 0
        if self.gather_across_devices:
            pages = [all_gather_with_grad(page_BD) for page_BD in pages]
            numbers, first = all_gather(labels.contiguous()), torch.distributed.get_rank() * len(queries_BD)
        pages_ND, numbers_N = torch.cat(pages), numbers.T.reshape(-1)
        losses, num_won = [], 0
        for begin in range(0, len(queries_BD), self.mini_batch_size):
            own = torch.arange(begin, min(begin + self.mini_batch_size, len(queries_BD)), device=queries_BD.device)
            scores_BN = self.similarity_fct(queries_BD[own], pages_ND) * self.scale
            is_own_page_BN = numbers_N == labels[own, :1]
            num_won += int(is_own_page_BN.gather(1, scores_BN.argmax(dim=1, keepdim=True)).sum())
            is_own_page_BN[torch.arange(len(own)), first + own] = False
            scores_BN = scores_BN.masked_fill(is_own_page_BN, float("-inf"))
            loss = torch.nn.functional.cross_entropy(scores_BN, first + own, reduction="sum") / len(queries_BD)
            if with_backward:
                loss.backward()
                loss = loss.detach()
            losses.append(loss)
        self.accuracy = num_won / len(queries_BD)
        return torch.stack(losses).sum()


class HeldOut(BaseEvaluator):
    """nDCG@10 and the rate of first places on held-out pairs: every query against all held-out pages."""

    def __init__(self, pairs: Sequence[Pair], to_inputs: Callable[[Sequence[Any]], list[Any]], batch_size: int) -> None:
        super().__init__()
        self.primary_metric = f"ndcg@{NDCG_AT}"
        self._pairs, self._to_inputs, self._batch_size = pairs, to_inputs, batch_size
        self._pages = list(dict.fromkeys(pair.page for pair in pairs))

    def __call__(
        self, model: Any, output_path: str | None = None, epoch: float = -1, steps: int = -1
    ) -> dict[str, float]:
        """Return the metrics."""
        pages = encode(model, [{"page": page} for page in self._pages], self._to_inputs, self._batch_size)
        queries = encode(model, [pair.query for pair in self._pairs], self._to_inputs, self._batch_size)
        names = [f"{row:08d}" for row in range(len(self._pages))]
        places = []
        for pair, scores in zip(self._pairs, queries @ pages.T, strict=True):
            found = [hit.page_id for hit in rank(names, scores, len(names))]
            places.append(found.index(names[self._pages.index(pair.page)]))
        gains = [1 / math.log2(place + 2) if place < NDCG_AT else 0.0 for place in places]
        first = float(np.mean([place == 0 for place in places]))
        return {f"ndcg@{NDCG_AT}": float(np.mean(gains)), "recall@1": first, "num_pages": float(len(names))}


class Journal(TrainerCallback):
    """Appends the trainer's logs and the in-batch accuracy to metrics.jsonl, and shows a line of them."""

    def __init__(self, file: Path, loss: InBatchLoss, console: Console) -> None:
        self._file, self._loss, self._console = file, loss, console

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Drop the lines of steps after the checkpoint from which the run resumes."""
        if state.is_world_process_zero:
            cut_metrics_after(self._file, state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Write one line."""
        if not state.is_world_process_zero or not logs:
            return
        row = {"step": state.global_step, **logs}
        if "loss" in logs:
            row["in_batch_accuracy"] = self._loss.accuracy
        with open(self._file, "a") as stream:
            stream.write(json.dumps(row) + "\n")
        shown = [name for name in SHOWN if name in row]
        if shown:
            values = "  ".join(f"{SHOWN[name]} {short(float(row[name]), 3)}" for name in shown)
            self._console.info(f"step {state.global_step}/{state.max_steps}  {values}")


def encode(model: Any, items: Sequence[Any], to_inputs: Callable[[Sequence[Any]], list[Any]], batch: int) -> np.ndarray:
    """Return (N, D) unit vectors of queries (str) or pages ({"page": ...})."""
    parts = []
    for start in range(0, len(items), batch):
        inputs = to_inputs(items[start : start + batch])
        parts.append(model.encode(inputs, batch_size=batch, show_progress_bar=False, convert_to_numpy=True))
    vectors = np.concatenate(parts).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def inputs_of(identity: ModelIdentity) -> Callable[[Sequence[Any]], list[Any]]:
    """Return a function that turns queries (str) and pages ({"page": source}) into a model's inputs.

    It raises RsgrpoError for a page with damaged pixels, because reading the pairs checks only headers.
    """
    resize, prefix = identity.loader.resize, identity.settings.query_prefix or ""

    def to_inputs(items: Sequence[Any]) -> list[Any]:
        try:
            return [prefix + item if isinstance(item, str) else resize(decode(item["page"])) for item in items]
        except PromptError as error:
            raise RsgrpoError(f"{error}; fix or remove the pair and run the same command to resume") from error

    return to_inputs


def mine_negatives(
    pairs: Sequence[Pair], queries_ND: np.ndarray, pages_MD: np.ndarray, pages: Sequence[str | bytes], count: int
) -> list[Pair]:
    """Give each pair the `count` pages nearest to its query that are not its own.

    Raises:
        InputError: there are too few pages.
    """
    if len(pages) <= count:
        raise InputError(f"mined_negatives {count} needs more than {count} distinct pages, got {len(pages)}; lower it")
    mined = []
    names = [f"{row:08d}" for row in range(len(pages))]
    for pair, query_D in zip(pairs, queries_ND, strict=True):
        nearest = [pages[int(hit.page_id)] for hit in rank(names, pages_MD @ query_D, count + 1)]
        others = [page for page in nearest if page != pair.page][:count]
        mined.append(Pair(pair.query, pair.page, tuple(others)))
    return mined


def train(
    config: RetrieverConfig, pairs: Sequence[Pair], held_out: Sequence[Pair], out: Path, console: Console
) -> dict[str, float]:
    """Train until the last step and write OUT/model; a run that was stopped resumes from its last checkpoint.

    Returns:
        The metrics on the held-out pairs at the end; empty if there are none.
    """
    torch.manual_seed(config.seed)
    identity = identify(config.encoder())
    model = load_sentence_transformer(identity)
    model.model_card_data.generate_widget_examples = False  # it would read our pages as its own kind of input
    to_inputs = inputs_of(identity)
    if config.mined_negatives:
        pages = list(dict.fromkeys(pair.page for pair in pairs))
        pages_MD = encode(model, [{"page": page} for page in pages], to_inputs, config.micro_batch_size)
        queries_ND = encode(model, [pair.query for pair in pairs], to_inputs, config.micro_batch_size)
        pairs = mine_negatives(pairs, queries_ND, pages_MD, pages, config.mined_negatives)
    _choose_parameters(model, config)
    arguments = _arguments(config, out, evaluates=bool(held_out))  # creating them starts the process group
    loss = InBatchLoss(
        model, scale=1 / config.temperature, mini_batch_size=config.micro_batch_size,
        gather_across_devices=arguments.world_size > 1,
    )  # fmt: skip
    evaluator = HeldOut(held_out, to_inputs, config.micro_batch_size) if held_out else None
    trainer = SentenceTransformerTrainer(
        model=model,
        args=arguments,
        train_dataset=as_dataset(pairs, config.seed),
        loss=loss,
        evaluator=evaluator,
        data_collator=SentenceTransformerDataCollator(
            preprocess_fn=lambda items, **options: model.preprocess(to_inputs(items), **options)
        ),
        callbacks=[Journal(out / "metrics.jsonl", loss, console)],
    )
    trainer.remove_callback(PrinterCallback)  # our console shows the progress
    trainer.train(resume_from_checkpoint=newest_checkpoint(out))
    metrics = evaluator(model) if evaluator else {}
    if trainer.is_world_process_zero():
        save(model, identity.settings, out / "model")
    return metrics


def as_dataset(pairs: Sequence[Pair], seed: int) -> Dataset:
    """Return the pairs, shuffled, with the columns in the order that the loss reads: query, page, negatives.

    `label` numbers the pages, equal ones equally.
    """
    ordered = list(pairs)
    Random(seed).shuffle(ordered)
    numbers = {page: number for number, page in enumerate(dict.fromkeys(p for pair in pairs for p in _pages(pair)))}
    columns: dict[str, list[Any]] = {"query": [pair.query for pair in ordered]}
    columns["page"] = [{"page": pair.page} for pair in ordered]
    for number in range(len(ordered[0].negatives)):
        columns[f"negative{number}"] = [{"page": pair.negatives[number]} for pair in ordered]
    columns["label"] = [[numbers[page] for page in _pages(pair)] for pair in ordered]
    return Dataset.from_dict(columns)


def _pages(pair: Pair) -> tuple[str | bytes, ...]:
    return (pair.page, *pair.negatives)


def newest_checkpoint(out: Path) -> str | None:
    """Return the newest complete checkpoint; one that a kill interrupted has no trainer state."""
    whole = [file.parent for file in out.glob("checkpoint-*/trainer_state.json")]
    return str(max(whole, key=lambda folder: int(folder.name.rpartition("-")[2]))) if whole else None


def save(model: Any, settings: EncoderSettings, folder: Path) -> None:
    """Write the model and how its queries and pages are prepared, as `--model` expects it."""
    model.save(str(folder), create_model_card=False)
    kept = {"query_prefix": settings.query_prefix, "min_pixels": settings.min_pixels, "max_pixels": settings.max_pixels}
    write_text(folder / RETRIEVER_FILE, json.dumps(kept, indent=1) + "\n")


def _choose_parameters(model: Any, config: RetrieverConfig) -> None:
    if config.freeze_vision:
        for name, parameter in model.named_parameters():
            if VISION in name:
                parameter.requires_grad_(False)
    if config.lora_rank:
        from peft import LoraConfig

        skip = f".*{VISION}.*" if config.freeze_vision else None
        adapter = LoraConfig(
            r=config.lora_rank, lora_alpha=2 * config.lora_rank, target_modules="all-linear", exclude_modules=skip
        )
        model.add_adapter(adapter)


def _arguments(config: RetrieverConfig, out: Path, *, evaluates: bool) -> SentenceTransformerTrainingArguments:
    cpu = not torch.cuda.is_available()
    return SentenceTransformerTrainingArguments(
        output_dir=str(out),
        per_device_train_batch_size=config.batch_size,
        max_steps=config.total_steps,
        learning_rate=config.lr,
        weight_decay=config.weight_decay,
        lr_scheduler_type="linear",
        warmup_steps=config.warmup_steps,
        bf16=config.bf16,
        use_cpu=cpu,
        gradient_checkpointing=config.gradient_checkpointing,
        seed=config.seed,
        data_seed=config.seed,
        eval_strategy="steps" if evaluates else "no",
        eval_steps=config.eval_every if evaluates else None,
        save_strategy="steps",
        save_steps=config.save_every,
        save_total_limit=config.keep_last,
        logging_steps=config.log_every,
        logging_first_step=True,
        dataloader_drop_last=True,
        dataloader_pin_memory=not cpu,
        remove_unused_columns=False,
        report_to=[],
        disable_tqdm=True,
        ddp_find_unused_parameters=False,
    )
