"""How a row's gold columns become the `truth` that rewards see. A run names its reader in `data.gold`.

A reader is called with the answer column, the row's other columns and the number of its images, and returns the whole
truth. Shipped are `plain` (answers as they are written), `rewards.evisrag:read_gold` (gold evidence and answer) and
`detect`, which chooses between these two row by row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

from rewards.api import RewardError, import_user_module

GoldReader = Callable[[Any, Mapping[str, Any], int], Mapping[str, Any]]


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
    reader = getattr(import_user_module(module_name, target), name, None)
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
    if is_texts(answer) and answer:
        return {**columns, "answers": list(answer)}
    raise GoldError("no gold answer", f"the answer must be text or a list of texts, got {answer!r:.80}")


def detect(answer: Any, columns: Mapping[str, Any], num_images: int) -> dict[str, Any]:
    """Read a row with gold evidence, in tags or in a column, as EVisRAG's; any other one as plain answers.

    Raises:
        GoldError: the row cannot be read in that way.
    """
    from rewards.evisrag import has_gold_tags, read_gold

    if columns.get("evidence") is None and not has_gold_tags(answer):
        return plain(answer, columns)
    return read_gold(answer, columns, num_images)


def is_texts(value: Any) -> bool:
    """Whether a value is a list of texts."""
    return isinstance(value, list | tuple) and all(isinstance(entry, str) for entry in value)
