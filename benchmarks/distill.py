"""A student catches up with its teacher: on-policy distillation against imitation of the teacher's responses.

    python -m benchmarks.distill [--folder .] [--seeds 3]      # after `make demo`, in the folder of demo/ and runs/
    python -m benchmarks.distill --table                       # only the tables, from the finished runs

The student is the demo's warm start, the teacher the same model after RS-GRPO (`runs/demo/export`). One arm is
`recipe=demo_distill`: the student samples, the teacher scores every token, no reward. The other is supervised training
on responses that the teacher sampled to all training prompts, two each; sampling them is not counted, and malformed
ones are left out. Both start from the same weights, run on one thread in this process and are measured at equal CPU
seconds, validation not counted. Each arm's learning rate is chosen first, on a seed that is not used afterwards. A
finished run is one small json in `distill/`; others are run again from their start.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from rollout.files import write_text
from rsgrpo.config.train import SftConfig, TrainConfig
from rsgrpo.lab.compare import interval

RESULTS = Path("distill")
TUNING_SEED = 101
RATES = (3e-4, 1e-3)
SECONDS = 20.0
"""CPU seconds of training of one run, about 10 steps of distillation or 50 of supervised training."""
MEASURED_AT = (5.0, 10.0, 20.0)
REACHED = (0.8, 0.9)
ARMS = {"distill": "on-policy distillation", "sft": "supervised on the teacher's responses"}
SCORE = "val/sampled/accuracy"
ENOUGH_STEPS = 10_000
COMMON = (
    "cluster=inline",
    "learner.num_threads=1",
    "learner.lr_schedule=constant",
    "learner.warmup_steps=5",
    f"total_steps={ENOUGH_STEPS}",
    f"checkpoint.every={ENOUGH_STEPS}",
    "checkpoint.keep_best=0",
    "checkpoint.export=false",
    "tracking.store_rollouts=false",
    f"validation.every={ENOUGH_STEPS}",
    "validation.at_start=false",
    "validation.greedy=false",
    "validation.samples=2",
)


@dataclass(frozen=True, slots=True)
class Taught:
    """One run: the score of the student before, and every time it was measured.

    seconds: CPU seconds of training before each score. scores: sampled F1 on held-out rows. steps: in the whole run.
    """

    arm: str
    rate: float
    seed: int
    seconds: tuple[float, ...]
    scores: tuple[float, ...]
    steps: int

    def at(self, seconds: float) -> float:
        """Return the score after some seconds, on straight lines between measurements."""
        return float(np.interp(seconds, self.seconds, self.scores))

    def until(self, score: float) -> float:
        """Return the seconds until the score is first reached; infinity if it never is."""
        points = zip(self.seconds, self.scores, strict=True)
        for (before, low), (after, high) in itertools.pairwise(points):
            if high >= score:
                return before if low >= score else before + (after - before) * (score - low) / (high - low)
        return float("inf")

    @property
    def area(self) -> float:
        """Mean score over the seconds up to the last that every run has."""
        return float(np.mean([self.at(second) for second in np.linspace(0, SECONDS, 41)]))


def teach(arm: str, rate: float, seed: int) -> Taught:
    """Train a fresh student for `SECONDS` of CPU time, measuring it on the way."""
    from rsgrpo import cli
    from rsgrpo.cluster.local import LocalCluster
    from rsgrpo.running.run import Run, run_folder
    from rsgrpo.running.validation import validate_policy, validation_modes

    step_of: Callable[[Any, int], None]
    overrides = [*COMMON, f"learner.lr={rate}", f"seed={seed}", f"name=distill-{arm}"]
    if arm == "distill":
        config = cli.compose(
            TrainConfig, overrides=["recipe=demo_distill", *overrides, "gate.every=0", "guards.rules={}"]
        )
        step_of = _distil
    else:
        sft = cli.compose(
            SftConfig,
            "sft",
            [
                "recipe=sft_demo", *overrides, "output_dir=runs", "model.path=demo/sft/export",
                "model.freeze_vision=true", "data.train=distill/taught.jsonl", "data.image_dir=demo/data",
                "data.bad_rows=drop",
            ],
        )  # fmt: skip
        from recipes.sft import as_train_config

        config = as_train_config(sft)
        step_of = _supervised(sft)
    shutil.rmtree(run_folder(config), ignore_errors=True)
    modes = validation_modes(config.validation, config.rollout.max_response_tokens, config.seed)
    marks: list[tuple[float, float]] = []
    spent, step = 0.0, 0
    with Run.open(config, start_cluster=LocalCluster, line_every=ENOUGH_STEPS) as run:

        def measure() -> None:
            run.cluster.sync_weights(step)
            metrics, _ = validate_policy(run.val_prompts, modes, run.cluster.sample_and_score)
            run.cluster.rest_engines()
            marks.append((round(spent, 2), round(metrics[SCORE], 4)))

        measure()
        due = [*MEASURED_AT]
        while due:
            step += 1
            began = time.process_time()
            step_of(run, step)
            spent += time.process_time() - began
            if spent >= due[0]:
                due = [second for second in due if second > spent]
                measure()
    shutil.rmtree(run_folder(config))
    seconds, scores = zip(*marks, strict=True)
    return Taught(arm, rate, seed, seconds, scores, step)


def _distil(run: Any, step: int) -> None:
    from rsgrpo.train import take_step

    take_step(run, step)


def _supervised(config: SftConfig) -> Callable[[Any, int], None]:
    from recipes.answers.gold_responses import GoldResponses

    gold = GoldResponses(config)

    def take(run: Any, step: int) -> None:
        groups, _ = gold.groups(run.stream.next(config.batch_size))
        run.cluster.learner.supervised_update(groups)

    return take


def write_taught_rows(path: Path, *, per_prompt: int = 2) -> None:
    """Let the teacher answer every training prompt; write rows to imitate and say what that cost."""
    from rollout.hf.engine import HFEngine
    from rollout.types import SamplingParams
    from rsgrpo import cli
    from rsgrpo.data.dataset import load_prompts

    config = cli.compose(TrainConfig, overrides=["recipe=demo"])
    began = time.process_time()
    engine = HFEngine("runs/demo/export", config.rollout, config.inputs, num_threads=1)
    prompts = list(load_prompts(config.data.train, config.data, config.prompt, engine.processor))
    sampling = SamplingParams(group_size=per_prompt, max_tokens=config.rollout.max_response_tokens, seed=0)
    rows = {json.loads(line)["id"]: json.loads(line) for line in Path(config.data.train).read_text().splitlines()}
    lines = [
        json.dumps({**rows[group.prompt.id], "id": f"{group.prompt.id}-{index}", "answer": rollout.text})
        for group in engine.generate(prompts, sampling)
        for index, rollout in enumerate(group.rollouts)
        if rollout.finish_reason == "stop"
    ]
    write_text(path, "".join(f"{line}\n" for line in sorted(lines)))
    print(f"{path}: {len(lines)} responses of the teacher, {time.process_time() - began:.0f} s of CPU", flush=True)


def sweep(num_seeds: int, results: Path) -> list[Taught]:
    """Run what is missing; return the runs at each arm's own rate."""

    def run(arm: str, rate: float, seed: int) -> Taught:
        path = results / f"{arm}-{rate:g}-seed{seed}.json"
        if not path.exists():
            write_text(path, json.dumps(asdict(taught := teach(arm, rate, seed))) + "\n")
            print(f"{path}: {taught.scores[0]:.3f} -> {taught.scores[-1]:.3f}", flush=True)
        return read(path)

    results.mkdir(exist_ok=True)
    if not (rows := results / "taught.jsonl").exists():
        write_taught_rows(rows)
    rates: dict[str, float] = {}
    for arm in ARMS:
        areas = {rate: run(arm, rate, TUNING_SEED).area for rate in RATES}
        rates[arm] = max(areas, key=areas.__getitem__)
    return [run(arm, rates[arm], seed) for seed in range(1, num_seeds + 1) for arm in ARMS]


def read(path: Path) -> Taught:
    """Return a finished run."""
    found = json.loads(path.read_text())
    return replace(Taught(**found), seconds=tuple(found["seconds"]), scores=tuple(found["scores"]))


def mean_score(run: Taught) -> float:
    """Return a run's mean score."""
    return run.area


def table(runs: Sequence[Taught]) -> str:
    """Return the scores at equal CPU seconds, and the seconds to equal scores, as markdown."""
    by_arm = {arm: sorted((run for run in runs if run.arm == arm), key=lambda run: run.seed) for arm in ARMS}
    lines = [
        f"| after | {' | '.join(ARMS.values())} | difference, 95% |",
        "|---|---|---|---|",
    ]

    def line(what: str, value: Callable[[Taught], float], form: str) -> str:
        columns = {arm: [value(run) for run in found] for arm, found in by_arm.items()}
        pairs = [one - other for one, other in zip(*columns.values(), strict=True)]
        means = " | ".join(format(float(np.mean(values)), form) for values in columns.values())
        return f"| {what} | {means} | {interval(pairs) if np.isfinite(pairs).all() else 'not all reach it'} |"

    lines += [
        line(f"{second:g} s: sampled F1", partial(Taught.at, seconds=second), ".3f") for second in (0.0, *MEASURED_AT)
    ]
    lines += [line("mean over the run", mean_score, ".3f")]
    lines += [line(f"seconds to {score:g}", partial(Taught.until, score=score), ".1f") for score in REACHED]
    rates = ", ".join(f"{arm} {found[0].rate:g} ({found[0].steps} steps)" for arm, found in by_arm.items())
    return "\n".join([*lines, "", f"Learning rates: {rates}. Seeds: {', '.join(str(r.seed) for r in by_arm['sft'])}."])


def tuning(results: Path) -> Iterator[str]:
    """Yield a line per rate that was tried."""
    for path in sorted(results.glob(f"*-seed{TUNING_SEED}.json")):
        run = read(path)
        yield f"{run.arm} at {run.rate:g}: mean {run.area:.3f}, at the end {run.scores[-1]:.3f}"


def main() -> None:
    """Run what is missing; print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--folder", type=Path, default=Path(), help="holds demo/ and runs/demo/, as make demo leaves them"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--table", action="store_true", help="run nothing; print the tables of finished runs")
    arguments = parser.parse_args()
    os.chdir(arguments.folder)  # the recipes name data and models from there
    if arguments.table:
        finished = [read(path) for path in RESULTS.glob("*.json")]
        runs = [run for run in finished if run.seed != TUNING_SEED]
    else:
        runs = sweep(arguments.seeds, RESULTS)
    print("\n".join([*tuning(RESULTS), "", table(runs)]))


if __name__ == "__main__":
    main()
