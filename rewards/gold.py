"""The shipped readers of gold columns, for `data.gold`: `plain`, `read_gold` (EVisRAG's rows), and `detect`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rewards.evisrag import has_gold_tags
from rewards.evisrag import read_gold as read_gold
from rewards.truth import GoldError as GoldError
from rewards.truth import plain as plain


def detect(answer: Any, columns: Mapping[str, Any], num_images: int) -> dict[str, Any]:
    """Read a row with gold evidence, in tags or in a column, as EVisRAG's; any other one as plain answers.

    Raises:
        GoldError: the row cannot be read in that way.
    """
    if columns.get("evidence") is None and not has_gold_tags(answer):
        return plain(answer, columns)
    return read_gold(answer, columns, num_images)
