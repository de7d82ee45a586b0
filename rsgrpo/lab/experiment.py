"""The measurement: rollouts, the reference gradient, then every rule's gradient on the batches that are left."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from rsgrpo.algorithm.advantages import term_weights
from rsgrpo.algorithm.scoring import RewardSet, has_signal
from rsgrpo.cluster.local import LocalCluster
from rsgrpo.config.train import AlgorithmConfig
from rsgrpo.lab.batches import Batch, policy_checkpoint, sampled_batches, stored_batches
from rsgrpo.lab.compare import Interval, interval, signal_to_noise, token_weights
from rsgrpo.lab.config import LabConfig
from rsgrpo.lab.gradients import Direction, Measured, Reference, measure_batch, reference_gradient
from rsgrpo.records.console import Console
from rsgrpo.running.prompts import load_run_prompts
from rsgrpo.running.stopping import StopSignals
from rsgrpo.types import TrainGroup

__all__ = ["Results", "RewardRow", "RuleRow", "measure"]


@dataclass(frozen=True, slots=True)
class RewardRow:
    """One reward under one rule: as `RuleRow`, on the batches that were split."""

    reward: str
    cosine: Interval
    norm: float
    blocks: dict[str, float]


@dataclass(frozen=True, slots=True)
class RuleRow:
    """What is said of one rule.

    cosine: of one batch's gradient with the reference. cosines: those of every batch, which any two rules share.
    difference: from the rule that the others are compared with, over the same batches. norm: mean length of a batch's
    gradient. blocks: mean share of |token weight| by block.
    """

    rule: str
    cosine: Interval
    cosines: tuple[float, ...]
    difference: Interval
    signal_to_noise: float
    norm: float
    blocks: dict[str, float]
    rewards: tuple[RewardRow, ...]


@dataclass(frozen=True)
class Results:
    """All that was measured.

    num_batches: those on which every rule was measured; fewer than `wanted_batches` in a measurement that was stopped.
    shown: groups for the page, and by rule the (T,) token weights of each of their rollouts.
    """

    rows: tuple[RuleRow, ...]
    against: str
    reference_agreement: float
    reference_norm: float
    num_batches: int
    wanted_batches: int
    num_reference_batches: int
    num_reward_batches: int
    prompts: int
    group_size: int
    scores: dict[str, float]
    shown: Batch
    shown_weights: dict[str, list[list[np.ndarray]]]

    def lines(self) -> Iterator[str]:
        """Return the tables as text."""
        stopped = f" (stopped: {self.wanted_batches} were asked for)" if self.num_batches < self.wanted_batches else ""
        yield (
            f"{self.num_batches}{stopped} batches of {self.prompts} x {self.group_size} rollouts; reference: "
            f"{self.num_reference_batches} further batches, whose two halves agree at cosine "
            f"{self.reference_agreement:.3f}"
        )
        yield "mean scores: " + ", ".join(f"{name} {score:.3f}" for name, score in self.scores.items())
        labels = list(dict.fromkeys(label for row in self.rows for label in row.blocks))
        yield ""
        head = ["rule", "cosine", f"minus {self.against}", "signal/noise", "norm", *labels]
        yield from _table([head, *(rule_cells(row, labels) for row in self.rows)])
        if any(row.rewards for row in self.rows):
            yield ""
            yield f"by reward, on {self.num_reward_batches} of these batches:"
            head = ["rule", "reward", "cosine", "norm", *labels]
            yield from _table([head, *(reward_cells(row, each, labels) for row in self.rows for each in row.rewards)])


def rule_cells(row: RuleRow, labels: Sequence[str]) -> list[str]:
    """Return a rule's row of the table."""
    shares = [f"{row.blocks.get(label, 0.0):.0%}" for label in labels]
    return [row.rule, str(row.cosine), str(row.difference), f"{row.signal_to_noise:.3f}", f"{row.norm:.3g}", *shares]


def reward_cells(row: RuleRow, reward: RewardRow, labels: Sequence[str]) -> list[str]:
    """Return a reward's row of the table."""
    shares = [f"{reward.blocks.get(label, 0.0):.0%}" for label in labels]
    return [row.rule, reward.reward, str(reward.cosine), f"{reward.norm:.3g}", *shares]


def measure(
    config: LabConfig,
    rules: Mapping[str, AlgorithmConfig],
    console: Console,
    on_batch: Callable[[Results], object] = lambda results: None,
) -> Results:
    """Collect rollouts, then take every gradient. Nothing is trained.

    Args:
        on_batch: called with what is known after every measured batch from the second one on.

    Raises:
        InputError: model, rows, run or rewards cannot be used.
        StopRequested: a signal came before two batches were measured; after that it ends the measurement early.
    """
    stop = StopSignals()
    stop.listen()
    try:
        return _measure(config, rules, console, on_batch, stop)
    finally:
        stop.close()


def _measure(
    config: LabConfig,
    rules: Mapping[str, AlgorithmConfig],
    console: Console,
    on_batch: Callable[[Results], object],
    stop: StopSignals,
) -> Results:
    lab = config.lab
    checkpoint = policy_checkpoint(config)
    weights_K = [config.reward_weights.get(name, 1.0) for name in config.rewards]
    count = lab.batches + lab.reference_batches
    stored: list[Batch] | None = None
    stream = None
    if lab.run and not lab.fresh:
        with console.phase("reading", total=count) as bar:
            stored = stored_batches(config, RewardSet.from_config(config), count, bar)
    else:
        unvalidated = replace(config, validation=replace(config.validation, every=0, at_start=False))
        stream = load_run_prompts(unvalidated, console).stream
    cluster = LocalCluster(config, total_steps=1, run_dir=Path(out_folder(config)), check_stop=stop.check)
    try:
        if checkpoint is not None:
            cluster.learner.load(checkpoint.learner_folder)
            cluster.sync_weights(checkpoint.step)
        if stored is None:
            assert stream is not None
            console.info(f"Sampling {count} batches of {config.algorithm.prompts_per_step} prompts.")
            with console.phase("sampling", total=count) as bar:
                batches = sampled_batches(config, cluster, stream, count, bar)
        else:
            batches = stored
    finally:
        cluster.close()  # the engine gives up its memory before the gradients are taken
    held_out, measured_on = divided(batches, lab.batches)
    console.info(f"Reference gradient of {len(held_out)} batches, then {len(rules)} rules on {len(measured_on)}.")
    with console.phase("reference", total=len(held_out)) as bar:

        def advance() -> None:
            bar.advance()
            stop.check()

        reference = reference_gradient(cluster.learner, held_out, weights_K, config.algorithm, advance)
    measured = {name: Measured() for name in rules}
    shown: dict[str, list[TrainGroup]] = {}
    with console.phase("rules", total=len(measured_on) * len(rules)) as bar:
        for index, scored in enumerate(measured_on):
            for name, algorithm in rules.items():
                split = index < lab.reward_batches
                groups = measure_batch(
                    cluster.learner, scored, weights_K, algorithm, reference, measured[name], split=split
                )
                if index == 0:
                    shown[name] = groups
                bar.advance()
            if index:  # an interval needs two batches
                results = _results(config, rules, measured, reference, measured_on[: index + 1], shown, weights_K)
                on_batch(results)
                if stop.requested:
                    break
    return results


def divided(batches: Sequence[Batch], num_measured: int) -> tuple[list[Batch], list[Batch]]:
    """Return (held out for the reference, measured); the measured ones are spread evenly over the order.

    >>> divided([[1], [2], [3], [4], [5], [6]], 2)
    ([[2], [3], [5], [6]], [[1], [4]])
    """
    chosen = {index * len(batches) // num_measured for index in range(num_measured)}
    return (
        [batch for index, batch in enumerate(batches) if index not in chosen],
        [batch for index, batch in enumerate(batches) if index in chosen],
    )


def out_folder(config: LabConfig) -> Path:
    """Return where the results are written."""
    return Path(config.lab.out or f"{config.output_dir}/{config.name}-lab")


def _results(
    config: LabConfig,
    rules: Mapping[str, AlgorithmConfig],
    measured: Mapping[str, Measured],
    reference: Reference,
    batches: Sequence[Batch],
    shown: Mapping[str, Sequence[TrainGroup]],
    weights_K: Sequence[float],
) -> Results:
    base = measured[config.lab.against].whole.cosines
    rows = tuple(_row(name, one, base) for name, one in measured.items())
    order = sorted(range(len(batches[0])), key=lambda index: not has_signal(batches[0][index]))[
        : config.lab.shown_groups
    ]
    weights = {}
    for name, groups in shown.items():
        loss_weights_K = term_weights(rules[name].advantage, weights_K)
        all_PG = token_weights(groups, loss_weights_K, rules[name].average)
        weights[name] = [[w_KT.sum(0) for w_KT in all_PG[index]] for index in order]
    return Results(
        rows=rows,
        against=config.lab.against,
        reference_agreement=reference.agreement,
        reference_norm=reference.norm,
        num_batches=len(batches),
        wanted_batches=config.lab.batches,
        num_reference_batches=config.lab.reference_batches,
        num_reward_batches=min(config.lab.reward_batches, len(batches)),
        prompts=len(batches[0]),
        group_size=len(batches[0][0].group.rollouts),
        scores=_mean_scores(batches),
        shown=[batches[0][index] for index in order],
        shown_weights=weights,
    )


def _row(name: str, measured: Measured, base: Sequence[float]) -> RuleRow:
    whole = measured.whole
    return RuleRow(
        rule=name,
        cosine=interval(whole.cosines),
        cosines=tuple(whole.cosines),
        difference=interval([mine - other for mine, other in zip(whole.cosines, base, strict=True)]),
        signal_to_noise=signal_to_noise(whole.squared_norms, whole.squared_norm_of_mean),
        norm=_mean_norm(whole),
        blocks=_mean_shares(measured.shares),
        rewards=tuple(
            RewardRow(reward, interval(one.cosines), _mean_norm(one), _mean_shares(measured.reward_shares[reward]))
            for reward, one in measured.by_reward.items()
        ),
    )


def _mean_norm(direction: Direction) -> float:
    return float(np.mean(np.sqrt(direction.squared_norms)))


def _mean_shares(shares: Sequence[Mapping[str, float]]) -> dict[str, float]:
    labels = dict.fromkeys(label for each in shares for label in each)
    return {label: sum(each.get(label, 0.0) for each in shares) / len(shares) for label in labels}


def _mean_scores(batches: Sequence[Batch]) -> dict[str, float]:
    names = batches[0][0].reward_names_K
    rows = [scores_K for scored in batches for group in scored for scores_K in group.scores_GK]
    found = {name: [row[k] for row in rows if row[k] is not None] for k, name in enumerate(names)}
    return {
        name: float(np.mean(np.array(scores, dtype=float))) if scores else math.nan for name, scores in found.items()
    }


def _table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        first, *others = zip(row, widths, strict=True)
        yield "  ".join([f"{first[0]:<{first[1]}}", *(f"{cell:>{width}}" for cell, width in others)])
