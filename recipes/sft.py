"""Supervised fine-tuning on whole gold responses: `python -m recipes.sft recipe=sft_demo`.

The same data, learner, validation, checkpoints and export as `rsgrpo.train`; only the update is another one. One rank
runs in this process, several are spread by Ray.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from rollout.config import RolloutConfig
from rollout.images import PromptError
from rollout.inputs import InputProcessor
from rollout.types import Prompt
from rsgrpo import cli
from rsgrpo.cluster import Cluster
from rsgrpo.config import AlgorithmConfig, SftConfig, TrainConfig, validate_sft
from rsgrpo.data import PromptDataset
from rsgrpo.errors import RsgrpoError
from rsgrpo.local import LocalCluster
from rsgrpo.run import Run, StopRequested
from rsgrpo.types import Sample, TrainGroup

REWARDS = {name: f"rewards.evisrag:{name}" for name in ("accuracy", "evidence", "well_formed")}
MONITORS = {name: f"rewards.evisrag:{name}" for name in ("marked_rate", "abstained")}
STEPS_PER_LINE = 20
MAX_LISTED_ROWS = 10


def sft(config: SftConfig) -> None:
    """Train one run to its last step, or until a signal asks it to stop; both leave a checkpoint."""
    validate_sft(config)
    with Run(
        as_train_config(config),
        settings=dataclasses.asdict(config),
        start_cluster=LocalCluster if config.learner.num_ranks == 1 else Cluster,
        line_every=STEPS_PER_LINE,
    ) as run:
        gold = GoldResponses(config)
        if config.data.bad_rows == "error":
            gold.check(run.train_prompts)
        try:
            run.validate_if_due()
            for step in run.steps_left:
                take_step(run, step, gold)
        except StopRequested as stop:
            run.save()
            run.console.warning(f"stopped by {stop} after step {run.step}; the same command goes on from there")
            return
        run.finish()


def take_step(run: Run, step: int, gold: GoldResponses) -> None:
    """Imitate one batch; where a validation follows, also measure the loss on held-out rows."""
    learner = run.cluster.learner
    with run.timed("learn"):
        groups, num_dropped = gold.groups(run.stream.next(gold.config.batch_size))
        metrics: dict[str, float] = learner.call("supervised_update", groups)
    if num_dropped:
        metrics["data/dropped"] = float(num_dropped)
    if run.validates_at(step):
        held_out, _ = gold.groups(run.val_prompts)
        with run.timed("held_out"):
            metrics["val/loss"] = learner.call("supervised_loss", held_out)["actor/loss"]
        run.cluster.sync_weights(step)
    run.end_step(step, [], groups, [], metrics)


class GoldResponses:
    """Turns rows into what the learner imitates: the answer column as written, end-of-text appended."""

    def __init__(self, config: SftConfig) -> None:
        self.config = config
        self._processor = InputProcessor(
            config.model.path,
            config.inputs,
            revision=config.model.revision,
            trust_remote_code=config.model.trust_remote_code,
        )

    def check(self, prompts: PromptDataset) -> None:
        """Refuse rows that cannot be imitated.

        Raises:
            RsgrpoError: lists them.
        """
        faults = [f"  id {prompt.id}: {fault}" for prompt in prompts if (fault := self._encode(prompt)[1])]
        if faults:
            more = [f"  ... and {len(faults) - MAX_LISTED_ROWS} more"] if len(faults) > MAX_LISTED_ROWS else []
            raise RsgrpoError(
                "\n".join(
                    [
                        f"{self.config.data.train}: {len(faults)} of {len(prompts)} rows have no response to imitate:",
                        *faults[:MAX_LISTED_ROWS],
                        *more,
                        "Mend them, or leave them out with data.bad_rows=drop",
                    ]
                )
            )

    def groups(self, prompts: Sequence[Prompt]) -> tuple[list[TrainGroup], int]:
        """Return a group of one sample per usable row, and how many rows were not usable.

        Raises:
            RsgrpoError: none is.
        """
        encoded = [(prompt, self._encode(prompt)[0]) for prompt in prompts]
        groups = [TrainGroup(prompt, (_sample(ids),)) for prompt, ids in encoded if ids is not None]
        if not groups:
            raise RsgrpoError(
                f"none of {len(prompts)} rows has a response to imitate; the first: {self._encode(prompts[0])[1]}"
            )
        return groups, len(prompts) - len(groups)

    def _encode(self, prompt: Prompt) -> tuple[list[int] | None, str]:
        """Return the response's tokens, or None and why there are none."""
        text = prompt.truth.get("gold")
        if text is None:
            return None, f"column {self.config.data.answer_key!r} holds a list of answers, not a response"
        try:
            token_ids = self._processor.encode_response(text)
        except PromptError as error:
            return None, str(error)
        limit = self.config.max_response_tokens
        if len(token_ids) > limit:
            return None, f"the response has {len(token_ids):,} tokens, max_response_tokens is {limit:,}"
        return token_ids, ""


def _sample(token_ids: Sequence[int]) -> Sample:
    """Return a response without scopes: supervised steps teach all of it."""
    none_KT = (0, len(token_ids))
    return Sample(np.asarray(token_ids, dtype=np.int64), np.zeros(none_KT, dtype=bool), np.zeros(none_KT, np.float32))


def as_train_config(config: SftConfig) -> TrainConfig:
    """Return the run's settings as the parts that it shares with training read them."""
    shared = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(TrainConfig)
        if hasattr(config, field.name)
    }
    return TrainConfig(
        **shared,
        algorithm=AlgorithmConfig(prompts_per_step=config.batch_size),
        rollout=RolloutConfig(max_response_tokens=config.max_response_tokens, dtype=config.learner.precision),
        rewards=REWARDS,
        monitors=MONITORS,
    )


if __name__ == "__main__":
    cli.run(sft, SftConfig, "sft")
