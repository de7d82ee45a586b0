"""Tell by its columns which other trainer a row was written for; `recipes.files.foreign` converts it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TRAINERS = ("verl", "easyr1", "trl", "swift", "llamafactory")


def trainer_of(columns: Mapping[str, Any]) -> str:
    """Return one of TRAINERS, or "" for a row that is not shaped like any of their rows."""
    names = set(columns)
    if isinstance(columns.get("reward_model"), Mapping) and "prompt" in names:
        return "verl"
    if {"problem", "answer"} <= names:
        return "easyr1"
    if isinstance(columns.get("prompt"), list):
        return "trl"
    if isinstance(columns.get("messages"), list):
        return "swift" if "solution" in names else "llamafactory"
    return "llamafactory" if {"instruction", "output"} <= names or "conversations" in names else ""


def how_to_convert(columns: Mapping[str, Any]) -> str:
    """Return a sentence with the command that converts such rows; "" for rows of no other trainer."""
    trainer = trainer_of(columns)
    if not trainer:
        return ""
    return (
        f". It looks like a row for {trainer}: convert the file with `python -m recipes.prepare convert FILE "
        f"--from {trainer} --out rows.jsonl`"
    )
