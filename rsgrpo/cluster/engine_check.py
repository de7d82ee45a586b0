"""Checks that engines and learner see the same pages and have the same weights; if not, the run stops.

A few greedy tokens on fixed prompts show what no later metric can tell apart from bad learning: weights that did not
arrive, images that the engine never saw, other pixels.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from typing import Any, Protocol

import numpy as np
from PIL import Image

from rollout.config import TurnsConfig
from rollout.inputs.images import read_size
from rollout.turns.episode import LIMIT
from rollout.turns.probe import PROBE, TURN_TOKENS
from rollout.types import ImageSource, Prompt, Rollout, RolloutGroup, SamplingParams
from rsgrpo.cluster.protocol import LearnerRanks
from rsgrpo.config.train import TrainConfig
from rsgrpo.errors import RsgrpoError
from rsgrpo.types import Sample, TrainGroup

FLOAT32_TOLERANCE, BFLOAT16_TOLERANCE = 1e-4, 0.3
SPIKE = 3.0
"""In bfloat16 one token may differ by this much more than the tolerance, and the mean by as much less."""

SEARCHED_ROWS = 64
CHECKED_PROMPTS, CHECKED_TOKENS = 2, 32
"""Training rows that are compared, those with the most images, and greedy tokens of each."""


class EnginesDiffer(RsgrpoError):
    """Engine and learner disagree; the message is the whole table."""


class Engines(Protocol):
    """What is asked of the engines (`rollout.workers.pool.RolloutPool`)."""

    def generate_on_each(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[list[RolloutGroup]]:
        """Return the groups of all prompts, in their order, from every engine."""

    def count_vision(self, prompts: Sequence[Prompt]) -> list[list[tuple[int, int, int]]]:
        """Return `rollout.engine.Engine.count_vision` of every engine."""


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the table.

    where: engine and prompt. found, wanted: as text.
    """

    where: str
    what: str
    found: str
    wanted: str
    holds: bool


def tolerance_of(config: TrainConfig) -> float:
    """Return the largest difference of a token's log-probability that counts as agreement."""
    if config.gate.tolerance:
        return config.gate.tolerance
    exact = config.rollout.dtype == "float32" and config.learner.precision == "float32"
    return FLOAT32_TOLERANCE if exact else BFLOAT16_TOLERANCE


def choose_prompts(prompts: Iterable[Prompt], num_prompts: int) -> list[Prompt]:
    """Return the prompts with the most images among the first rows, in the order of the rows."""
    rows = list(islice(prompts, SEARCHED_ROWS))
    most = sorted(range(len(rows)), key=lambda index: (-len(rows[index].images), index))[:num_prompts]
    return [rows[index] for index in sorted(most)]


def blanked(prompt: Prompt) -> Prompt:
    """Return the prompt with grey pages of the same sizes."""
    pages = []
    for source in prompt.images:
        height, width = read_size(source)
        page = io.BytesIO()
        Image.new("RGB", (width, height), (128, 128, 128)).save(page, "PNG")
        pages.append(page.getvalue())
    return replace(prompt, id=f"{prompt.id} blanked", images=tuple(pages))


def check_engines(
    config: TrainConfig, engines: Engines, learner: LearnerRanks, prompts: Sequence[Prompt], version: int
) -> None:
    """Compare every engine with the learner, with the settings of a run.

    Raises:
        EnginesDiffer: they disagree; the message is the whole table.
    """
    require_agreement(run_checks(config, engines, learner, prompts, version), version)


def run_checks(
    config: TrainConfig, engines: Engines, learner: LearnerRanks, prompts: Sequence[Prompt], version: int
) -> list[Check]:
    """Return all checks of a run's settings, those of a tool's page where it has an environment."""
    checks = compare_engines(
        engines,
        learner,
        prompts,
        num_tokens=min(CHECKED_TOKENS, config.rollout.max_response_tokens),
        tolerance=tolerance_of(config),
        version=version,
    )
    if config.rollout.turns.environment and (shown := images_shown(config.rollout.turns)):
        checks += compare_turns(engines, learner, prompts[0], shown, tolerance=tolerance_of(config))
        if config.inputs.max_images:
            checks += count_pages(engines, learner, prompts[0], shown)
    return checks


def images_shown(limits: TurnsConfig) -> tuple[int, ...]:
    """Return how many images a tool shows after each turn of the check: one, then two, where the limits allow it."""
    shown = (1, min(2, limits.max_images - 1))
    return tuple(count for count in shown[: limits.max_turns - 1] if 0 < count <= limits.max_images)


def compare_engines(
    engines: Engines,
    learner: LearnerRanks,
    prompts: Sequence[Prompt],
    *,
    num_tokens: int,
    tolerance: float,
    version: int,
) -> list[Check]:
    """Compare every engine with the learner on `prompts`.

    Returns:
        One line per check, also of those that hold.
    """
    blank = [blanked(prompt) for prompt in prompts]
    sampling = SamplingParams(group_size=1, temperature=0.0, max_tokens=num_tokens)
    engine_counts = engines.count_vision(prompts)
    learner_counts = learner.count_vision(prompts)
    checks: list[Check] = []
    for index, groups in enumerate(engines.generate_on_each([*prompts, *blank], sampling)):
        seen, unseen = groups[: len(prompts)], groups[len(prompts) :]
        failed = [group for group in groups if group.error is not None]
        if failed:
            checks += [
                Check(f"engine {index}, {group.prompt.id}", "is sampled", str(group.error), "a response", False)
                for group in failed
            ]
            continue
        asked = [as_train_group(group, prompt) for group, prompt in zip(seen, prompts, strict=True)]
        expected = _first(learner.logprobs(asked, temperature=1.0))
        # At a temperature far below the tolerance a log-probability is the distance to the best token.
        sharp = tolerance / 10
        margins = _first(learner.logprobs(asked, temperature=sharp))
        unseen_asked = [as_train_group(group, page, replays=False) for group, page in zip(seen, blank, strict=True)]
        without = _first(learner.logprobs(unseen_asked, temperature=1.0))
        for p, group in enumerate(seen):
            where = f"engine {index}, {group.prompt.id}"
            logprobs_T = np.asarray(group.rollouts[0].logprobs_T)
            checks += [
                _equal(where, "weights version", group.rollouts[0].weights_version, version),
                _equal(where, "prompt tokens, image tokens", tuple(engine_counts[index][p][:2]), learner_counts[p][:2]),
                _equal(where, "image features of the engine", engine_counts[index][p][2], learner_counts[p][1]),
                _equal(where, "image features of the learner", learner_counts[p][2], learner_counts[p][1]),
                _at_most(where, "greedy token below the best", float(-sharp * margins[p].min()), tolerance),
                *_agreement(where, logprobs_T, expected[p], tolerance),
            ]
        if any(prompt.images for prompt in prompts):
            # Rounding alone: 1e-7 in float32, 0.01 in bfloat16. An image may change little on an untrained model.
            least = tolerance / (100 if tolerance <= FLOAT32_TOLERANCE else 10)
            changes = [_change(full.rollouts[0], bare.rollouts[0]) for full, bare in zip(seen, unseen, strict=True)]
            checks.append(_more_than(f"engine {index}", "blank pages change its answer by", max(changes), least))
            changes = [_largest(full, bare) for full, bare in zip(expected, without, strict=True)]
            checks.append(_more_than("learner", "blank pages change its answer by", max(changes), least))
    return checks


def compare_turns(
    engines: Engines, learner: LearnerRanks, prompt: Prompt, shown: Sequence[int] = (1, 2), *, tolerance: float
) -> list[Check]:
    """Compare every engine with the learner on a conversation in which a tool returns pages after each turn.

    The pages of each turn must be read, and must change what follows them.

    Args:
        shown: pages that the tool returns after each turn; those of the prompt, or noise.
    """
    turns = _turns(prompt, shown)
    grey = [blanked(replace(prompt, images=images)).images for images in turns]
    asked = [_probed(prompt, "with a tool's pages", turns)]
    asked += [
        _probed(prompt, f"with those of turn {turn + 1} blanked", [*turns[:turn], grey[turn], *turns[turn + 1 :]])
        for turn in range(len(turns))
    ]
    sampling = SamplingParams(temperature=0.0, max_tokens=TURN_TOKENS * (len(turns) + 1))
    checks: list[Check] = []
    for index, (full, *hidden) in enumerate(engines.generate_on_each(asked, sampling)):
        where = f"engine {index}, {asked[0].id}"
        errors = [group.error for group in (full, *hidden) if group.error is not None]
        if errors:
            checks.append(Check(where, "is sampled", errors[0], "a response", False))
            continue
        checks += _turn_checks(learner, where, full, hidden, grey, tolerance)
    return checks


def _turns(prompt: Prompt, shown: Sequence[int]) -> list[tuple[ImageSource, ...]]:
    pages = cycle(prompt.images or (_noise(0), _noise(1)))
    return [tuple(islice(pages, count)) for count in shown]


def _probed(prompt: Prompt, name: str, turns: Sequence[Sequence[ImageSource]]) -> Prompt:
    return replace(prompt, id=f"{prompt.id} {name}", truth={PROBE: turns})


def _turn_checks(
    learner: LearnerRanks,
    where: str,
    full: RolloutGroup,
    hidden: Sequence[RolloutGroup],
    grey: Sequence[Sequence[ImageSource]],
    tolerance: float,
) -> list[Check]:
    """Return the checks of one engine's conversation; hidden: the same with the pages of one turn blanked, by turn."""
    (rollout,) = full.rollouts
    asked = as_train_group(full, full.prompt)
    read = {turn: rollout.observations[turn] for turn in range(len(grey)) if turn < len(rollout.observations)}
    read = {turn: observation for turn, observation in read.items() if observation.fault != LIMIT}
    blank = [
        [replace(each, images=tuple(grey[turn])) if each is observation else each for each in rollout.observations]
        for turn, observation in read.items()
    ]
    bare = replace(asked.samples[0], experts_RLk=None)
    without = [replace(asked, samples=(replace(bare, observations=tuple(each)),)) for each in blank]
    expected, *changed = _first(learner.logprobs([asked, *without], temperature=1.0))
    checks = _agreement(where, np.asarray(rollout.logprobs_T), expected, tolerance)
    least = tolerance / (100 if tolerance <= FLOAT32_TOLERANCE else 10)
    for (turn, observation), changed_T in zip(read.items(), changed, strict=True):
        behind, what = slice(observation.at, None), f"blanking the pages of turn {turn + 1} changes what follows by"
        change = _change(_behind(rollout, behind), _behind(hidden[turn].rollouts[0], behind))
        checks += [
            _equal(where, f"pages read after turn {turn + 1}", len(observation.images), len(grey[turn])),
            _more_than(where, what, change, least),
            _more_than("learner", what, _largest(expected[behind], changed_T[behind]), least),
        ]
    return checks


def count_pages(engines: Engines, learner: LearnerRanks, prompt: Prompt, shown: Sequence[int] = (1, 2)) -> list[Check]:
    """Compare the image tokens and features of each page that `compare_turns` shows."""
    checks = []
    for number, images in enumerate(_turns(prompt, shown), 1):
        pages = [Prompt(f"page {page} of turn {number}", "<image>", (image,)) for page, image in enumerate(images, 1)]
        ours, what = learner.count_vision(pages), f"image tokens, image features of turn {number}"
        wanted = [(num_tokens, num_tokens) for _, num_tokens, _ in ours]
        checks.append(_equal("learner", what, [counts[1:] for counts in ours], wanted))
        for index, theirs in enumerate(engines.count_vision(pages)):
            checks.append(_equal(f"engine {index}", what, [counts[1:] for counts in theirs], wanted))
    return checks


def _behind(rollout: Rollout, behind: slice) -> Rollout:
    return replace(rollout, token_ids_T=rollout.token_ids_T[behind], logprobs_T=rollout.logprobs_T[behind])


def _noise(seed: int) -> bytes:
    """Return a page of noise, for data without images."""
    page = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (112, 112, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(page, "PNG")
    return page.getvalue()


def as_train_group(group: RolloutGroup, prompt: Prompt, *, replays: bool = True) -> TrainGroup:
    """Return the group's responses after `prompt`, as the learner takes them; they teach nothing.

    replays: with the experts that they were sampled with, where these are recorded.
    """
    samples = []
    for rollout in group.rollouts:
        token_ids_T = np.asarray(rollout.token_ids_T, dtype=np.int64)
        none_KT = np.zeros((1, len(token_ids_T)))
        samples.append(
            Sample(
                token_ids_T,
                none_KT.astype(bool),
                none_KT.astype(np.float32),
                observations=rollout.observations,
                experts_RLk=rollout.experts_RLk if replays else None,
            )
        )
    return TrainGroup(prompt, tuple(samples), group.prompt_experts_TLk if replays else None)


def require_agreement(checks: Sequence[Check], version: int) -> None:
    """Raise EnginesDiffer with the table unless every check holds."""
    wrong = sum(not check.holds for check in checks)
    if wrong:
        raise EnginesDiffer(
            f"{wrong} of {len(checks)} checks of engines against the learner failed (weights version {version}): the "
            "engines do not sample from the policy that is trained, so training on their samples would be meaningless. "
            "If the differences are rounding, raise gate.tolerance; gate.every=0 turns the check off.\n" + table(checks)
        )


def table(checks: Sequence[Check]) -> str:
    """Return the checks as aligned lines; those that failed are marked."""
    rows = [("", "where", "what", "found", "wanted")]
    rows += [("" if check.holds else "!!", check.where, check.what, check.found, check.wanted) for check in checks]
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def _first(logprobs: Sequence[Sequence[np.ndarray]]) -> list[np.ndarray]:
    return [samples[0] for samples in logprobs]


def _largest(ours_T: np.ndarray, theirs_T: np.ndarray) -> float:
    return float(np.abs(ours_T - theirs_T).max())


def _agreement(where: str, ours_T: np.ndarray, theirs_T: np.ndarray, tolerance: float) -> list[Check]:
    """Compare log-probabilities of a response: every token in float32, and in bfloat16 the mean as well.

    bfloat16 rounds most tokens little and a few unlikely ones a lot; a fault of the engine moves the mean.
    """
    largest = _largest(ours_T, theirs_T)
    if tolerance <= FLOAT32_TOLERANCE:
        return [_at_most(where, "log-probabilities differ by", largest, tolerance)]
    mean = float(np.abs(ours_T - theirs_T).mean())
    return [
        _at_most(where, "log-probabilities differ on average by", mean, tolerance / SPIKE),
        _at_most(where, "log-probabilities differ by", largest, tolerance * SPIKE),
    ]


def _change(full: Any, bare: Any) -> float:
    """Return infinity when the tokens differ, else the largest change of a token's log-probability."""
    if list(full.token_ids_T) != list(bare.token_ids_T):
        return float("inf")
    return _largest(np.asarray(full.logprobs_T), np.asarray(bare.logprobs_T))


def _equal(where: str, what: str, found: Any, wanted: Any) -> Check:
    return Check(where, what, str(found), str(wanted), found == wanted)


def _at_most(where: str, what: str, found: float, limit: float) -> Check:
    return Check(where, what, f"{found:.2g}", f"<= {limit:g}", found <= limit)


def _more_than(where: str, what: str, found: float, limit: float) -> Check:
    return Check(where, what, f"{found:.2g}", f"> {limit:g}", found > limit)
