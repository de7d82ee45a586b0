"""Why a reward applied to no response, or found its scope in none: what it looked for, and what it found."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from rewards.api import Between, Response, Reward

TAG = re.compile(r"</?\w+>")


class WatchedTruth(Mapping[str, Any]):
    """A response's truth that records in `missing` the keys that are looked up and absent."""

    def __init__(self, truth: Mapping[str, Any], missing: list[str]) -> None:
        self._truth = truth
        self._missing = missing

    def __getitem__(self, key: str) -> Any:
        if key not in self._truth and key not in self._missing:
            self._missing.append(key)
        return self._truth[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._truth)

    def __len__(self) -> int:
        return len(self._truth)


async def why_never(function: Reward, responses: Sequence[Response]) -> str:
    """Return why a reward gives None for each of these responses, as far as calling it again shows."""
    missing: list[str] = []
    for response in responses:
        value = function(replace(response, truth=WatchedTruth(response.truth, missing)))
        if inspect.isawaitable(value):
            await value
    hint = f"hint: it returned None (did not apply) for all {len(responses)} responses, so it would teach nothing. "
    if missing:
        known = ", ".join(sorted(set().union(*(response.truth for response in responses)))) or "no truth at all"
        wanted = ", ".join(f"truth[{key!r}]" for key in missing)
        return f"{hint}It looked for {wanted}, which is missing; the rows have {known}."
    tags = ", ".join(sorted({tag for response in responses for tag in TAG.findall(response.text)}))
    return (
        f"{hint}No column was missing: check the condition under which it returns None. The responses have "
        f"{f'the tags {tags}' if tags else 'no tags'}."
    )


def why_no_scope(function: Reward, responses: Sequence[Response]) -> str:
    """Return which markers of the scope every response lacks."""
    scope = function.scope
    markers = [marker for marker in (scope.start, scope.end) if marker] if isinstance(scope, Between) else []
    absent = [marker for marker in markers if not any(marker in response.text for response in responses)]
    found = f"no response has {' or '.join(absent)}" if absent else "check the function that is its scope"
    return f"hint: its scope is found in none of {len(responses)} responses, so it would teach nothing: {found}."
