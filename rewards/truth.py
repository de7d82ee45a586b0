"""How a row's gold columns become the `truth` that rewards see: what a reader is, and the one for plain answers.

A run names its reader in `data.gold`; `rewards.gold` lists the shipped ones. Standard library only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

from rewards.api import RewardError
from rewards.loading import import_user_module

GoldReader = Callable[[Any, Mapping[str, Any], int], Mapping[str, Any]]
"""(answer column, the row's other columns, number of its images) -> the row's whole truth."""


class GoldError(ValueError):
    """The gold columns of a row cannot be used.

    reason: a kind of fault, under which rows are counted. detail: what exactly is wrong.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


def load_gold_reader(target: str) -> GoldReader:
    """Import the reader that `module:function` names, from the Python path or the current directory.

    Raises:
        RewardError: there is no such module or function.
    """
    module_name, _, name = target.partition(":")
    if not module_name or not name:
        raise RewardError(f"data.gold must be module:function, such as rewards.gold:plain, got {target!r}")
    reader = getattr(import_user_module(module_name, name), name, None)
    if not callable(reader):
        raise RewardError(f"data.gold={target}: module {module_name} has no function {name!r}")
    return cast(GoldReader, reader)


def plain(answer: Any, columns: Mapping[str, Any], num_images: int = 0) -> dict[str, Any]:
    """Return the columns with `answers`, the accepted texts, and `gold`, the answer as written if it is one text.

    Raises:
        GoldError: the answer is neither text nor a list of texts.
    """
    if isinstance(answer, str) and answer.strip():
        return {**columns, "gold": answer, "answers": [answer.strip()]}
    if is_texts(answer) and any(text.strip() for text in answer):
        return {**columns, "answers": list(answer)}
    missing = f"the answer is missing; the row's other columns are {', '.join(columns) or 'none'}"
    if answer is None or isinstance(answer, str) or (is_texts(answer) and not any(answer)):
        raise GoldError("no gold answer", "the answer is empty" if answer is not None else missing)
    raise GoldError("no gold answer", f"the answer must be text or a list of texts, got {answer!r:.80}")


def is_texts(value: Any) -> bool:
    """Whether a value is a list of texts."""
    return isinstance(value, list | tuple) and all(isinstance(entry, str) for entry in value)
