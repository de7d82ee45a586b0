"""Where the test questions are: EVisRAG-Test by name, a folder of its layout, or a user's own file."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections import Counter
from pathlib import Path

from recipes.answers.questions import Question, read_questions
from recipes.answers.spec import MADE_BY
from rollout.keys import nearest, require
from rsgrpo.config.checks import how_to_get
from rsgrpo.data.hub_folder import published_folder
from rsgrpo.errors import ConfigError, InputError

log = logging.getLogger(__name__)

BENCHMARKS = ("ChartQA", "InfoVQA", "SlideVQA", "DocVQA", "ViDoSeek")
HUB_OWNER = "openbmb"
PREFIX = "EVisRAG-Test-"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def load_benchmark(name: str, *, folder: str, topk: int, image_dir: str = "") -> list[Question]:
    """Return the questions of a benchmark, each with the first `topk` pages at most.

    Args:
        name: one of BENCHMARKS, a folder with `top<k>_test.jsonl`, a data file, or a hub data set "org/name".
        folder: where benchmarks are kept by name, as `EVisRAG-Test-SlideVQA` or `SlideVQA`.
        topk: pages per question; in a folder it chooses the file. 0 takes all pages of a data file.

    Raises:
        ConfigError: there is no such benchmark. InputError: its rows cannot be used.
    """
    path = find_benchmark(name, folder, topk)
    questions = read_questions(str(path), image_dir=image_dir, need_answers=True)
    repeated = [row_id for row_id, count in Counter(question.id for question in questions).items() if count > 1]
    if repeated:
        raise InputError(f"{path}: {len(repeated)} ids occur more than once, such as {repeated[0]!r}")
    if not topk:
        return questions
    if num_long := sum(len(question.images) > topk for question in questions):
        log.warning(
            "%s: %d of %d questions have more than topk=%d pages. The surplus is left out, although is_sufficient "
            "refers to all of them.",
            *(path, num_long, len(questions), topk),
        )
    return [
        dataclasses.replace(
            question, images=question.images[:topk], evidence=question.evidence and question.evidence[:topk]
        )
        for question in questions
    ]


def find_benchmark(name: str, folder: str, topk: int) -> Path:
    """Return the benchmark's data file; ConfigError if there is none."""
    if not name:
        raise ConfigError(f"benchmark is empty. Set it to one of {', '.join(BENCHMARKS)}, a folder or a data file.")
    if Path(name).is_file():
        return Path(name)
    known = next((known for known in BENCHMARKS if known.lower() == name.removeprefix(PREFIX).lower()), None)
    if known is None:
        if Path(name).is_dir():
            return _file_of(Path(name), topk)
        require(not name.startswith(tuple(MADE_BY)), how_to_get("benchmark", name, MADE_BY))
        if _HUB_ID.fullmatch(name) and not Path(name).parent.is_dir():
            return _file_of(_fetched(name, folder), topk)
        raise ConfigError(
            f"benchmark={name} is neither an existing file or folder nor one of {', '.join(BENCHMARKS)}"
            f"{nearest(name, BENCHMARKS)}"
        )
    for place in (Path(name), Path(folder) / f"{PREFIX}{known}", Path(folder) / known):
        if place.is_dir():
            return _file_of(place, topk)
    return _file_of(_fetched(f"{HUB_OWNER}/{PREFIX}{known}", folder), topk)


def _file_of(folder: Path, topk: int) -> Path:
    if topk < 1:
        raise ConfigError(f"topk must be >= 1 to choose a file in {folder}, got {topk}")
    path = folder / f"top{topk}_test.jsonl"
    if not path.is_file():
        there = ", ".join(sorted(entry.name for entry in folder.glob("top*_test.jsonl"))) or "no top<k>_test.jsonl"
        raise ConfigError(f"topk={topk}: {folder} has no {path.name}; it has {there}")
    return path


def _fetched(hub_id: str, folder: str) -> Path:
    local = f"{folder}/{hub_id.partition('/')[2]}"
    return published_folder(hub_id, local=local, setting=f"benchmark_dir={folder}, or benchmark={local}")
