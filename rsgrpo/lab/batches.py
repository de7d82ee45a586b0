"""The rollouts that the laboratory measures on: sampled here, or read from a run and scored again."""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby, islice
from pathlib import Path

from rollout.types import FinishReason, Prompt, Rollout, RolloutGroup
from rsgrpo.algorithm.scoring import RewardSet
from rsgrpo.cluster.local import LocalCluster
from rsgrpo.config.train import FilterConfig
from rsgrpo.data.dataset import PromptStream
from rsgrpo.data.streaming import StreamedPrompts
from rsgrpo.errors import InputError
from rsgrpo.lab.config import LabConfig
from rsgrpo.records.console import Bar
from rsgrpo.records.rollouts import StoredRollout, read_rollouts, rollout_files
from rsgrpo.running.batches import Collector
from rsgrpo.running.checkpoint import Checkpoint, CheckpointFolder
from rsgrpo.running.run import cut_prompts, train_sampling
from rsgrpo.types import ScoredGroup

Batch = list[ScoredGroup]

FINISHED: dict[str, FinishReason] = {"length": "length", "turns": "turns"}


def sampled_batches(
    config: LabConfig, cluster: LocalCluster, stream: PromptStream | StreamedPrompts, count: int, bar: Bar
) -> list[Batch]:
    """Sample and score `count` batches as training would, without a group filter."""
    collector = Collector(
        cluster.sample_to_learn, stream.next, cut_prompts(config), train_sampling(config), FilterConfig()
    )
    batches = []
    for index in range(count):
        batches.append(collector.collect(config.algorithm.prompts_per_step, index + 1)[0])
        bar.advance()
    return batches


def stored_batches(config: LabConfig, rewards: RewardSet, count: int, bar: Bar) -> list[Batch]:
    """Read the training rollouts of the `count` steps after `lab.step` and score them with the configured rewards.

    Raises:
        InputError: the run has not stored that many steps.
    """
    lab = config.lab
    run = Path(lab.run)
    paths = [path for step, path in rollout_files(run).items() if step > lab.step]
    if len(paths) < count:
        raise InputError(
            f"lab.run={lab.run} has stored rollouts of {len(paths)} steps after step {lab.step}, and lab.batches="
            f"{lab.batches} + lab.reference_batches={lab.reference_batches} need {count}. Lower them, or sample new "
            "ones with lab.fresh=true"
        )
    batches = []
    for path in islice(paths, count):
        groups = groupby(read_rollouts(path), key=lambda stored: stored.group)
        batches.append(rewards.score([rollout_group(run, list(group), config.prompt.system) for _, group in groups]))
        bar.advance()
    return batches


def rollout_group(run: Path, stored_G: list[StoredRollout], system: str) -> RolloutGroup:
    """Return a stored group as it was sampled. system: the run's system message, which is not stored."""
    first = stored_G[0]
    images = tuple(str(run / image) for image in first.images)
    prompt = Prompt(
        first.prompt_id, first.prompt_text, images, first.truth, first.question, system, videos=first.videos
    )
    return RolloutGroup(
        prompt,
        tuple(
            Rollout(
                token_ids_T=stored.token_ids_T,
                logprobs_T=stored.rollout_logprobs_T,
                text=stored.text,
                token_spans_T=stored.token_spans_T,
                finish_reason=FINISHED.get(stored.finish_reason, "stop"),
                weights_version=stored.weights_version,
                observations=tuple(
                    replace(observation, images=tuple(str(run / str(image)) for image in observation.images))
                    for observation in stored.observations
                ),
            )
            for stored in stored_G
        ),
    )


def policy_checkpoint(config: LabConfig) -> Checkpoint | None:
    """Return the checkpoint whose weights are the policy; None is the model as configured.

    Raises:
        InputError: there is no such run, or it has no checkpoint of `lab.step`.
    """
    lab = config.lab
    if lab.run and not Path(lab.run).is_dir():
        raise InputError(f"lab.run={lab.run}: there is no such folder")
    if not lab.step:
        return None
    checkpoints = CheckpointFolder(Path(lab.run) / "checkpoints", keep_last=1, keep_best=0).all()
    found = {checkpoint.step: checkpoint for checkpoint in checkpoints}
    if lab.step not in found:
        steps = ", ".join(map(str, sorted(found))) or "none"
        raise InputError(f"lab.step={lab.step}: {lab.run} has checkpoints of steps {steps}. Name one of them, or 0")
    return found[lab.step]
