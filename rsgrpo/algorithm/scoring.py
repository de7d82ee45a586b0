"""Score sampled groups: call the reward functions and find the characters that each may teach."""

from __future__ import annotations

import asyncio
import logging
import math
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from rewards.api import Credit, Response, Reward, RewardError, Span, Turn, check_score, load_reward
from rewards.calls import Lanes
from rewards.failures import where_raised
from rewards.turns import place_turns
from rollout.inputs.images import readable
from rollout.types import Rollout, RolloutGroup
from rsgrpo.config.train import TrainConfig
from rsgrpo.errors import InputError, RsgrpoError
from rsgrpo.types import ScoredGroup

log = logging.getLogger(__name__)

_LOGGED: set[str] = set()  # rewards whose failures this process has logged


class RewardFailed(RsgrpoError):
    """A reward raised an exception, exceeded its time limit or returned something that is not a score.

    trace: the whole traceback, for the run's log file; it survives the way from a worker to the driver.
    """

    trace = ""


@dataclass(frozen=True, slots=True)
class NamedReward:
    """One configured reward: its name in the config, the function with its arguments bound, and its time limit."""

    name: str
    function: Reward
    timeout_s: float = 0.0

    def __post_init__(self) -> None:
        if callable(self.timeout_s):
            raise InputError(
                f"NamedReward({self.name!r}): the third argument is timeout_s in seconds, got a function. The scope is "
                "read from the reward: leave it out."
            )


@dataclass(frozen=True, slots=True)
class RewardSet:
    """All rewards and monitors of a run, in a fixed order.

    missing_marker: what a missing scope marker means, as `algorithm.missing_marker` says.
    skip_errors: a failing reward does not apply and is counted, instead of stopping the run.
    """

    rewards: tuple[NamedReward, ...]
    monitors: tuple[NamedReward, ...] = ()
    missing_marker: str = "void"
    skip_errors: bool = False

    @classmethod
    def from_config(cls, config: TrainConfig) -> RewardSet:
        """Load every reward and monitor.

        Raises:
            InputError: one cannot be loaded, or takes other arguments.
        """

        def load(key: str, names: Mapping[str, str]) -> tuple[NamedReward, ...]:
            loaded = []
            for name, target in names.items():
                try:
                    reward = load_reward(target, config.reward_args.get(name))
                except RewardError as error:
                    raise InputError(f"{key}.{name}: {error}") from error
                loaded.append(NamedReward(name, reward, config.reward_timeouts_s.get(name, 0.0)))
            return tuple(loaded)

        return cls(
            rewards=load("rewards", config.rewards),
            monitors=load("monitors", config.monitors),
            missing_marker=config.algorithm.missing_marker,
            skip_errors=config.on_reward_error == "skip",
        )

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the rewards, in the order of the K axis."""
        return tuple(reward.name for reward in self.rewards)

    def score(self, groups: Sequence[RolloutGroup]) -> list[ScoredGroup]:
        """Score every rollout of every group; the async rewards of all rollouts run concurrently.

        Raises:
            RewardFailed: a reward failed and errors are not skipped.
        """
        return asyncio.run(self._score(groups))

    async def _score(self, groups: Sequence[RolloutGroup]) -> list[ScoredGroup]:
        lanes = Lanes()
        return list(await asyncio.gather(*(self.score_group(group, lanes) for group in groups)))

    async def score_group(self, group: RolloutGroup, lanes: Lanes) -> ScoredGroup:
        """Score one group; several calls on one event loop share `lanes`.

        Raises:
            RewardFailed: as `score`.
        """
        responses = [to_response(group, index) for index in range(len(group.rollouts))]
        rows = await asyncio.gather(
            *(self._score_response(f"{group.prompt.id}#{i}", response, lanes) for i, response in enumerate(responses))
        )
        return ScoredGroup(
            group=group,
            reward_names_K=self.names,
            scores_GK=[row.scores_K for row in rows],
            credits_GK=[row.credits_K for row in rows],
            missed_GK=[row.missed_K for row in rows],
            monitor_names_M=tuple(monitor.name for monitor in self.monitors),
            monitors_GM=[row.monitors_M for row in rows],
            num_errors_K=tuple(sum(row.failed_K[k] for row in rows) for k in range(len(self.rewards))),
        )

    async def _score_response(self, sample_id: str, response: Response, lanes: Lanes) -> _Row:
        """Ask all rewards at once; what they say is kept in their order, whichever answers first."""
        named = (*self.rewards, *self.monitors)
        answers = await asyncio.gather(*(self._value(reward, sample_id, response, lanes) for reward in named))
        row = _Row([], [], [], [], [])
        for reward, (value, failed) in zip(self.rewards, answers, strict=False):
            credits, missed = self._place(reward, sample_id, response, value)
            row.credits_K.append(credits)
            row.scores_K.append(sum(credit.score for credit in credits) / len(credits) if credits else None)
            row.missed_K.append(missed)
            row.failed_K.append(failed)
        row.monitors_M.extend(value if isinstance(value, float) else None for value, _ in answers[len(self.rewards) :])
        return row

    async def _value(
        self, reward: NamedReward, sample_id: str, response: Response, lanes: Lanes
    ) -> tuple[float | tuple[Credit, ...] | None, bool]:
        """Return a reward's value, and whether it failed and was skipped as configured."""
        try:
            return await _call(reward, sample_id, response, lanes), False
        except RewardFailed as error:
            if not self.skip_errors:
                raise
            if reward.name not in _LOGGED:
                _LOGGED.add(reward.name)
                message = "skipped, logged once and counted in reward/%s/errors: %s"
                log.warning(message, reward.name, error, extra={"trace": error.trace})
            return None, True

    def _place(
        self, reward: NamedReward, sample_id: str, response: Response, value: float | Sequence[Credit] | None
    ) -> tuple[tuple[Credit, ...], bool]:
        """Give a plain score its scope; return whether a marker was missing."""
        if value is None:
            return (), False
        if not isinstance(value, float):
            return tuple(value), any(credit.span is None for credit in value)
        span, determined_at = reward.function.scope(response), reward.function.determined
        missed = span is None
        if missed and self.missing_marker == "error":
            raise RewardFailed(
                f"reward '{reward.name}' finds no scope in sample {sample_id}; algorithm.missing_marker is 'error'. "
                f"Set it to 'void' to teach nothing there, or to 'widen' for the whole response.\n{_show(response)}"
            )
        # What is missing is known to be missing only when the response has ended.
        determined = determined_at(response) if determined_at else span.end if span else None
        if missed and self.missing_marker == "widen":
            span = Span(0, len(response.text))
        return (Credit("", value, span, len(response.text) if determined is None else determined),), missed


@dataclass(frozen=True, slots=True)
class _Row:
    """What all rewards say about one response."""

    scores_K: list[float | None]
    credits_K: list[tuple[Credit, ...]]
    missed_K: list[bool]
    failed_K: list[bool]
    monitors_M: list[float | None]


def to_response(group: RolloutGroup, index: int) -> Response:
    """Return rollout `index` of a group as a reward sees it."""
    rollout, prompt = group.rollouts[index], group.prompt
    return Response(
        text=rollout.text,
        truth=prompt.truth,
        num_tokens=len(rollout.token_ids_T),
        truncated=rollout.finish_reason == "length",
        question=prompt.question,
        images=readable(prompt.images),
        turns=tuple(_turns(rollout)),
    )


def _turns(rollout: Rollout) -> Iterator[Turn]:
    """Return the turns of a response; the end-of-text of each is at the character behind its span."""
    nowhere = Span(0, 0)
    answers = ((o.at_char, Turn(nowhere, o.text, readable(o.images), o.facts, o.fault)) for o in rollout.observations)
    return place_turns(rollout.text, answers)


async def _call(
    reward: NamedReward, sample_id: str, response: Response, lanes: Lanes
) -> float | tuple[Credit, ...] | None:
    """Call one reward; an error names the reward, the sample and the text."""
    try:
        value = await lanes.call(reward.function, response, reward.timeout_s)
        return check_score(value, len(response.text))
    except TimeoutError as error:
        limit = f"took longer than reward_timeouts_s.{reward.name}={reward.timeout_s:g} s"
        raise RewardFailed(f"reward '{reward.name}' {limit} on sample {sample_id}.\n{_show(response)}") from error
    except (Exception, SystemExit) as error:
        what = (
            f"called sys.exit({error.code!r})" if isinstance(error, SystemExit) else f"{type(error).__name__}: {error}"
        )
        failed = RewardFailed(
            f"reward '{reward.name}' failed on sample {sample_id}: {what}\n"
            f"  at {where_raised(error, reward.function)}\n{_show(response)}\n"
            "Fix the function, or set on_reward_error=skip to count such samples and continue."
        )
        failed.trace = "".join(traceback.format_exception(error))
        raise failed from error


def _show(response: Response) -> str:
    return f"--- response ({response.num_tokens} tokens) ---\n{response.text}\n--- end ---"


def group_mean(scored: ScoredGroup, weights: Mapping[str, float]) -> float:
    """Return the mean over a group of the weighted sum of its scores, which the group filter compares.

    weights: reward name -> factor; a reward that is not named counts once. NaN when no reward applied.
    """
    sums = []
    for scores_K in scored.scores_GK:
        named = zip(scored.reward_names_K, scores_K, strict=True)
        sums.append(sum(weights.get(name, 1.0) * score for name, score in named if score is not None))
    return sum(sums) / len(sums) if sums else math.nan


def has_signal(scored: ScoredGroup) -> bool:
    """Return whether some reward differs between rollouts of the group, so that there is something to learn."""
    seen: dict[tuple[int, str], set[float]] = {}
    for credits_K in scored.credits_GK:
        for k, credits in enumerate(credits_K):
            for credit in credits:
                seen.setdefault((k, credit.key), set()).add(credit.score)
    return any(len(scores) > 1 for scores in seen.values())
