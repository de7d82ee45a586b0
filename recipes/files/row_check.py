"""Check row by row whether rows can be used, as training does (`rsgrpo.data.dataset`), without starting a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from recipes.answers.questions import ANSWER_KEYS, ID_KEYS, IMAGE_KEYS, QUESTION_KEYS, named_prompt
from recipes.answers.spec import MADE_BY
from rewards.api import Response
from rewards.evisrag import well_formed
from rollout.config import InputsConfig
from rollout.types import Prompt
from rsgrpo.config.checks import require_model
from rsgrpo.config.train import DataConfig, RunConfig
from rsgrpo.data.dataset import about_images, sort_rows
from rsgrpo.data.faults import BadRow, counted, explained
from rsgrpo.data.foreign import trainer_of
from rsgrpo.data.prompts import TokenCounter
from rsgrpo.data.rows import Row, read_rows
from rsgrpo.data.turns import TURNS
from rsgrpo.errors import InputError

Purpose = Literal["grpo", "sft", "test"]
TEST_COLUMNS: Mapping[str, Sequence[str]] = {
    "id": ID_KEYS,
    "question": QUESTION_KEYS,
    "image": IMAGE_KEYS,
    "answer": ANSWER_KEYS,
}
NO_RESPONSE = (
    "no whole response",
    "the answer must be the four blocks observe, evidence, think, answer and nothing else",
)


@dataclass(frozen=True, slots=True)
class RowReport:
    """What a check found.

    good: rows that can be used. bad: the others, in file order. note: what is odd about the images; "" if nothing is.
    """

    num_rows: int
    good: tuple[Prompt, ...]
    bad: tuple[BadRow, ...]
    note: str = ""

    def lines(self) -> list[str]:
        """Return the report: a line for each bad row (one for all if they share their fault), then the counts."""
        notes = [self.note] if self.note else []
        if not self.bad:
            return [*notes, f"all {self.num_rows} rows can be used"]
        faults = explained(self.bad, self.num_rows, limit=len(self.bad)).splitlines()
        return [
            *notes,
            *(line.strip() for line in faults),
            f"{len(self.bad)} of {self.num_rows} rows cannot be used ({counted(self.bad)})",
        ]


class Uncounted:
    """Replaces a model's input processor where tokens are not counted."""

    def __init__(self, inputs: InputsConfig) -> None:
        self.inputs = inputs

    def count_tokens(self, prompt: Prompt) -> int:
        return 0


def check_rows(
    source: str,
    purpose: Purpose,
    inputs: InputsConfig,
    *,
    prompt: str = "",
    image_dir: str = "",
    gold: str = "",
    model: str = "",
    run: RunConfig | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> RowReport:
    """Check every row of a data source.

    purpose: "grpo" (gold evidence and answer), "sft" (whole responses), "test" (questions with accepted answers).
    prompt: a name in conf/prompt or a file; "" takes the rows' own messages, or "evidence" if the first has none.
    gold: module:function that reads a row's gold; "" takes the run's, else that of EVisRAG's blocks.
    model: folder or hub id of the model whose tokenizer counts tokens; "" skips that check.
    run: takes the prompt and the columns of the rows from a run's configuration.

    Raises:
        InputError: the source or the model cannot be read.
    """
    rows, folder = read_rows(source, keep_broken=True)
    if purpose == "test":
        rows = [_renamed(row) for row in rows]
    first: Mapping[str, Any] = next((row.columns for row in rows if not row.fault), {})
    if run is None:
        data = DataConfig(image_dir=image_dir, gold=gold or "rewards.evisrag:read_gold")
        has_own = bool(first.get("prompt")) or trainer_of(first) == "easyr1"
        template = named_prompt(prompt or ("raw" if has_own else "evidence"))
    else:
        template, data = named_prompt(prompt) if prompt else run.prompt, run.data
        data = replace(data, gold=gold or data.gold)
    good, bad = sort_rows(rows, data, template, _counter(model, inputs), folder=folder, progress=progress)
    if purpose == "sft":
        places = {row.columns.get("id") or f"row-{row.number}": row.place for row in rows}
        bad += [BadRow(places.get(row.id, ""), row.id, *NO_RESPONSE) for row in good if not _is_whole(row)]
        good = [row for row in good if _is_whole(row)]
        order = {row.place: row.number for row in rows}
        bad.sort(key=lambda row: order.get(row.place, 0))
    return RowReport(len(rows), tuple(good), tuple(bad), about_images(rows, data))


def _is_whole(prompt: Prompt) -> bool:
    if TURNS in prompt.truth:
        return True
    return isinstance(prompt.truth.get("gold"), str) and well_formed(Response(prompt.truth["gold"].strip())) == 1


def _renamed(row: Row) -> Row:
    """Return a test row under the names of training; a plain answer becomes a list of one."""
    columns: dict[str, Any] = dict(row.columns)
    for name, keys in TEST_COLUMNS.items():
        found = next((key for key in keys if columns.get(key) is not None), name)
        if found != name:
            columns[name] = columns.pop(found)
    answer = columns.get("answer")
    if isinstance(answer, str | int | float) and "</answer>" not in str(answer):
        columns["answer"] = [str(answer)]
    if columns.get("id") is not None:
        columns["id"] = str(columns["id"])
    return replace(row, columns=columns)


def _counter(model: str, inputs: InputsConfig) -> TokenCounter:
    if not model:
        return Uncounted(inputs)
    require_model("model", model, MADE_BY)
    from rollout.inputs.processor import InputProcessor

    try:
        return InputProcessor(model, inputs)
    except (InputError, OSError, ValueError) as error:
        raise InputError(f"the tokenizer of {model} cannot be loaded: {error}") from error
