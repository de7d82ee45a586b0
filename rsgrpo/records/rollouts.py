"""The parquet files of a run's rollouts: schema, writing, reading.

One row is one rollout. `rollouts/step_000012.parquet` holds the training rollouts of step 12 and
`rollouts/val_000012.parquet` the validation ones, told apart by `mode` ("greedy" or "sampled"). Images that were given
as bytes are stored once, by content.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rewards.api import Credit, Span
from rollout.errors import one_line
from rollout.files import replaced, write_bytes
from rollout.inputs.images import bytes_of
from rollout.types import ImageSource, Observation
from rsgrpo.errors import InputError, RsgrpoError

if TYPE_CHECKING:  # the reader needs no torch
    from rsgrpo.types import Sample, ScoredGroup, TrainGroup

log = logging.getLogger(__name__)

Split = Literal["train", "val"]
FOLDER = "rollouts"
IMAGE_FOLDER = "images"
_FILE_PREFIX: dict[str, str] = {"train": "step", "val": "val"}
_FILE_NAME = re.compile(r"(step|val)_(\d+)\.parquet")

_TEXT, _INT, _INTS = pa.string(), pa.int32(), pa.list_(pa.int32())
_CREDIT = pa.struct({"key": _TEXT, "score": pa.float64(), "start": _INT, "end": _INT, "determined": _INT})
_REWARD = pa.struct({"name": _TEXT, "score": pa.float64(), "missed": pa.bool_(), "credits": pa.list_(_CREDIT)})
_MONITOR = pa.struct({"name": _TEXT, "value": pa.float64()})
_RUN = pa.struct({"start": _INT, "end": _INT, "advantage": pa.float32()})
_TERM = pa.struct({"name": _TEXT, "runs": pa.list_(_RUN)})
_OBSERVATION = pa.struct(
    {"at": _INT, "at_char": _INT, "token_ids": _INTS, "text": _TEXT, "images": pa.list_(_TEXT), "facts": _TEXT}
    | {"fault": _TEXT}
)
_PLAIN = {
    "step": _INT,
    "split": _TEXT,
    "mode": _TEXT,
    "group": _INT,
    "sample": _INT,
    "prompt_id": _TEXT,
    "question": _TEXT,
    "prompt_text": _TEXT,
    "text": _TEXT,
    "num_tokens": _INT,
    "truncated": pa.bool_(),
    "finish_reason": _TEXT,
    "weights_version": pa.int64(),
}
SCHEMA = pa.schema(
    _PLAIN
    | {"images": pa.list_(_TEXT), "truth": _TEXT, "token_ids": _INTS, "token_starts": _INTS, "token_ends": _INTS}
    | {"rollout_logprobs": pa.list_(pa.float32())}
    | {"rewards": pa.list_(_REWARD), "monitors": pa.list_(_MONITOR), "terms": pa.list_(_TERM)}
    | {"observations": pa.list_(_OBSERVATION), "videos": pa.list_(pa.list_(pa.float64()))}
)


class RolloutsDamaged(InputError):
    """A rollout file cannot be read."""


@dataclass(frozen=True, slots=True)
class StoredReward:
    """What one reward said of one rollout.

    score: None: did not apply. missed: a scope marker was missing. credits: as in `ScoredGroup.credits_GK`.
    """

    name: str
    score: float | None
    missed: bool
    credits: tuple[Credit, ...]


@dataclass(frozen=True, slots=True)
class TokenRun:
    """Neighbouring tokens `start:end` inside a term's scope that share one advantage."""

    start: int
    end: int
    advantage: float


@dataclass(frozen=True, slots=True)
class StoredRollout:
    """One row of a rollout file.

    mode: "" for training rollouts. group: position of its prompt in the step. sample: its index in the group.
    images: paths to join to the run folder: absolute ones, or relative ones of images that were given as bytes.
    truth: gold columns, parsed back from JSON. monitors: name -> value, None where it did not apply.
    terms: loss term -> runs of its scope, outside of which it teaches nothing; empty where nothing was trained.
    observations: what it read between its turns, with images as `images` has them. videos: as `Prompt.videos`.
    """

    step: int
    split: str
    mode: str
    group: int
    sample: int
    prompt_id: str
    question: str
    prompt_text: str
    images: tuple[str, ...]
    truth: dict[str, Any]
    text: str
    token_ids_T: tuple[int, ...]
    token_spans_T: tuple[tuple[int, int], ...]
    num_tokens: int
    truncated: bool
    finish_reason: str
    weights_version: int
    rollout_logprobs_T: tuple[float, ...]
    rewards: tuple[StoredReward, ...]
    monitors: dict[str, float | None]
    terms: dict[str, tuple[TokenRun, ...]]
    observations: tuple[Observation, ...] = ()
    videos: tuple[tuple[float, ...], ...] = ()

    def scope_KT(self) -> np.ndarray:
        """Return (K, T) bool, the tokens that each loss term may teach."""
        scope_KT: np.ndarray = ~np.isnan(self.advantages_KT(outside=np.nan))
        return scope_KT

    def advantages_KT(self, outside: float = 0.0) -> np.ndarray:
        """Return (K, T) float32; tokens outside a term's scope have the value `outside`."""
        advantages_KT = np.full((len(self.terms), self.num_tokens), outside, dtype=np.float32)
        for k, runs in enumerate(self.terms.values()):
            for run in runs:
                advantages_KT[k, run.start : run.end] = run.advantage
        return advantages_KT


def advantage_runs(scope_T: np.ndarray, advantages_T: np.ndarray) -> list[TokenRun]:
    """Return the maximal runs of in-scope tokens with equal advantage.

    Example: scope [0, 1, 1, 1, 0, 1], advantages [0, .5, .5, -1, 0, -1] -> (1, 3, .5), (3, 4, -1), (5, 6, -1).
    """
    if not len(scope_T):
        return []
    differs_T = (scope_T[1:] != scope_T[:-1]) | (advantages_T[1:] != advantages_T[:-1])
    starts = [0, *(np.flatnonzero(differs_T) + 1).tolist()]
    ends = [*starts[1:], len(scope_T)]
    return [TokenRun(s, e, float(advantages_T[s])) for s, e in zip(starts, ends, strict=True) if scope_T[s]]


def write_rollouts(
    run_dir: Path,
    step: int,
    groups: Sequence[ScoredGroup],
    train_groups: Sequence[TrainGroup] = (),
    *,
    terms: Sequence[str] = (),
    split: Split = "train",
    mode: str = "",
) -> Path:
    """Write the rollouts of one step, whole or not at all, and return the file.

    groups: a group that could not be sampled (`error`) has no rows. A second call for the same validation step with
        another mode adds its rows; the same mode is replaced.
    train_groups: empty, or one per group, in the same order. terms: names of the K loss terms of their samples.
    """
    if train_groups and len(train_groups) != len(groups):
        raise RsgrpoError(f"rollouts of step {step}: {len(groups)} scored groups but {len(train_groups)} train groups")
    rows: list[dict[str, Any]] = []
    for index, scored in enumerate(groups):
        place = {"step": step, "split": split, "mode": mode, "group": index}
        samples = _matching_samples(scored, train_groups[index], terms) if train_groups else ()
        rows += _group_rows(run_dir, scored, samples, terms, place)
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    path = run_dir / FOLDER / f"{_FILE_PREFIX[split]}_{step:06d}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    if split == "val" and path.exists():
        try:
            earlier = pq.read_table(path, schema=SCHEMA)
            table = pa.concat_tables([earlier.filter(pc.field("mode") != mode), table])
        except (pa.ArrowException, OSError) as error:
            log.warning("%s cannot be read, so it is replaced: %s", path, one_line(error))
    with replaced(path) as unfinished:
        pq.write_table(table, unfinished, compression="zstd")
    return path


def read_rollouts(path: Path) -> list[StoredRollout]:
    """Return the rows of one rollout file, in the order in which they were written.

    Raises:
        RolloutsDamaged: it cannot be read.
    """
    try:
        return [_from_row(row) for row in pq.read_table(path, schema=SCHEMA).to_pylist()]
    except (pa.ArrowException, OSError, ValueError, TypeError, KeyError) as error:
        raise RolloutsDamaged(
            f"{path} cannot be read: {one_line(error)}. Remove it to go without its rollouts."
        ) from error


def rollout_files(run_dir: Path, split: Split = "train") -> dict[int, Path]:
    """Return step -> file, by step."""
    return dict(sorted((step, path) for prefix, step, path in _files(run_dir) if prefix == _FILE_PREFIX[split]))


def remove_rollouts_after(run_dir: Path, step: int | None) -> int:
    """Remove the files of later steps (of all steps for None) and half-written ones; return how many steps' files."""
    for leftover in (run_dir / FOLDER).glob(".*.tmp"):
        leftover.unlink()
    later = [path for _, file_step, path in _files(run_dir) if step is None or file_step > step]
    for path in later:
        path.unlink()
    return len(later)


def _files(run_dir: Path) -> Iterator[tuple[str, int, Path]]:
    for path in (run_dir / FOLDER).glob("*.parquet"):
        match = _FILE_NAME.fullmatch(path.name)
        if match:
            yield match[1], int(match[2]), path


def _matching_samples(scored: ScoredGroup, train_group: TrainGroup, terms: Sequence[str]) -> Sequence[Sample]:
    prompt, samples = scored.group.prompt, train_group.samples
    if train_group.prompt.id != prompt.id or len(samples) != len(scored.group.rollouts):
        raise RsgrpoError(
            f"rollouts of prompt {prompt.id!r} ({len(scored.group.rollouts)}) do not match the train group of prompt "
            f"{train_group.prompt.id!r} ({len(samples)} samples): pass both lists in the same order"
        )
    wrong = [len(sample.scope_KT) for sample in samples if len(sample.scope_KT) != len(terms)]
    if wrong:
        raise RsgrpoError(
            f"samples of {prompt.id!r} have {wrong[0]} loss terms but `terms` names {len(terms)}: {terms}"
        )
    return samples


def _group_rows(
    run_dir: Path,
    scored: ScoredGroup,
    samples: Sequence[Sample],
    terms: Sequence[str],
    place: dict[str, Any],
) -> Iterable[dict[str, Any]]:
    """Yield a group's rows. samples: one per rollout, or empty."""
    prompt = scored.group.prompt
    shared = {
        **place,
        "prompt_id": prompt.id,
        "question": prompt.question,
        "prompt_text": prompt.text,
        "images": [_store_image(run_dir, image) for image in prompt.images],
        "videos": [list(times) for times in prompt.videos],
        "truth": json.dumps(dict(prompt.truth), ensure_ascii=False, default=str),
    }
    for g, rollout in enumerate(scored.group.rollouts):
        spans_T2 = np.asarray(rollout.token_spans_T, dtype=np.int32).reshape(-1, 2)
        values_M = scored.monitors_GM[g] if scored.monitor_names_M else ()
        monitors = zip(scored.monitor_names_M, values_M, strict=True)
        yield {
            **shared,
            "sample": g,
            "text": rollout.text,
            "token_ids": np.asarray(rollout.token_ids_T, dtype=np.int32),
            "token_starts": spans_T2[:, 0],
            "token_ends": spans_T2[:, 1],
            "num_tokens": len(rollout.token_ids_T),
            "truncated": rollout.finish_reason == "length",
            "finish_reason": rollout.finish_reason,
            "weights_version": rollout.weights_version,
            "rollout_logprobs": np.asarray(rollout.logprobs_T, dtype=np.float32),
            "rewards": [_reward_cell(scored, g, k) for k in range(len(scored.reward_names_K))],
            "monitors": [{"name": name, "value": value} for name, value in monitors],
            "terms": _term_cells(samples[g], terms) if samples else [],
            "observations": [_observation_cell(run_dir, observation) for observation in rollout.observations],
        }


def _reward_cell(scored: ScoredGroup, g: int, k: int) -> dict[str, Any]:
    credits = [
        {
            "key": credit.key,
            "score": credit.score,
            "start": credit.span and credit.span.start,
            "end": credit.span and credit.span.end,
            "determined": credit.determined,
        }
        for credit in scored.credits_GK[g][k]
    ]
    score, missed = scored.scores_GK[g][k], bool(scored.missed_GK[g][k])
    return {"name": scored.reward_names_K[k], "score": score, "missed": missed, "credits": credits}


def _term_cells(sample: Sample, terms: Sequence[str]) -> list[dict[str, Any]]:
    rows = zip(terms, sample.scope_KT, sample.advantages_KT, strict=True)
    return [{"name": name, "runs": [asdict(run) for run in advantage_runs(s_T, a_T)]} for name, s_T, a_T in rows]


def _observation_cell(run_dir: Path, observation: Observation) -> dict[str, Any]:
    return {
        "at": observation.at,
        "at_char": observation.at_char,
        "token_ids": np.asarray(observation.token_ids_S, dtype=np.int32),
        "text": observation.text,
        "images": [_store_image(run_dir, image) for image in observation.images],
        "facts": json.dumps(dict(observation.facts), ensure_ascii=False, default=str),
        "fault": observation.fault,
    }


def _store_image(run_dir: Path, image: ImageSource) -> str:
    """Return an image's path as `StoredRollout.images` has it; bytes are written once, named by their content."""
    if isinstance(image, str):
        return os.path.abspath(image)
    content = bytes_of(image)
    reference = f"{FOLDER}/{IMAGE_FOLDER}/{hashlib.sha256(content).hexdigest()[:32]}"
    path = run_dir / reference
    if not path.exists() or path.stat().st_size != len(content):  # a power cut may leave an empty file
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, content)
    return reference


def _from_row(row: dict[str, Any]) -> StoredRollout:
    rewards = tuple(
        StoredReward(cell["name"], cell["score"], cell["missed"], tuple(_credit(c) for c in cell["credits"]))
        for cell in row["rewards"]
    )
    return StoredRollout(
        **{key: row[key] for key in _PLAIN},
        images=tuple(row["images"]),
        truth=json.loads(row["truth"]),
        token_ids_T=tuple(row["token_ids"]),
        token_spans_T=tuple(zip(row["token_starts"], row["token_ends"], strict=True)),
        rollout_logprobs_T=tuple(row["rollout_logprobs"]),
        rewards=rewards,
        monitors={cell["name"]: cell["value"] for cell in row["monitors"]},
        terms={cell["name"]: tuple(TokenRun(**run) for run in cell["runs"]) for cell in row["terms"]},
        observations=tuple(map(_observation, row["observations"] or ())),  # absent in files of older releases
        videos=tuple(map(tuple, row["videos"] or ())),
    )


def _observation(cell: dict[str, Any]) -> Observation:
    return Observation(
        cell["at"],
        cell["at_char"],
        tuple(cell["token_ids"]),
        cell["text"],
        tuple(cell["images"]),
        json.loads(cell["facts"]),
        cell["fault"],
    )


def _credit(cell: dict[str, Any]) -> Credit:
    span = None if cell["start"] is None else Span(cell["start"], cell["end"])
    return Credit(cell["key"], cell["score"], span, cell.get("determined"))  # absent in runs of version 0.1
