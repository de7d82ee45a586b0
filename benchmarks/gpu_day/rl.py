"""Whole RL steps in one process (`cluster=inline`): the demo, which must learn, and a model of real shape."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_day.day import Day
from benchmarks.gpu_day.material import TOKEN_PIXELS, model_folder, rows
from rsgrpo.records.tracking import read_metrics

ROOT = Path(__file__).parents[2]
PHASES = ("sample", "learn", "sync", "gate", "step")


def command(day: Day, module: str, *arguments: str) -> None:
    """Run one of the project's programs in the step's folder.

    Raises:
        CalledProcessError: it failed.
    """
    print(f"  python -m {module} {' '.join(arguments)}", flush=True)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    subprocess.run([sys.executable, "-m", module, *arguments], cwd=day.work, env=environment, check=True)


def warm_start(day: Day) -> Path:
    """Return the folder of the demo's warm start; make it, unless the one of `make demo` lies in the repository."""
    day.work.mkdir(parents=True, exist_ok=True)
    demo, export = day.work / "demo", Path("sft") / "export"
    made = ROOT / "demo"
    if not demo.exists() and (made / export / "preprocessor_config.json").exists() and not day.rehearse:
        demo.symlink_to(made)
    if not (demo / "model" / "preprocessor_config.json").exists():
        few = ["--sft-items", "16", "--train-items", "8", "--val-items", "4", "--vision-steps", "2"]
        command(day, "recipes.prepare", "demo", *day.pick([], few))
    if not (demo / export / "preprocessor_config.json").exists():
        few = ["total_steps=2", "batch_size=4", "learner.warmup_steps=1", "validation.every=0"]
        command(day, "recipes.sft", "recipe=sft_demo", *on_device(day), *day.pick([], few))
    return demo / export


def on_device(day: Day) -> list[str]:
    """Return the overrides that put the demo on the step's device."""
    return [f"learner.device={day.device_name}", *(["learner.num_threads=0"] if day.on_gpu else [])]


def tolerant(day: Day) -> list[str]:
    """Return the override with which a difference of engine and learner is measured instead of ending the run."""
    return ["gate.tolerance=0.3"] if day.on_gpu else []


def demo(day: Day) -> None:
    """Train the demo in float32 and, on a GPU, in bfloat16; record what was learnt and the seconds of each phase."""
    warm_start(day)
    steps = day.pick(20, 2)
    few = ["algorithm.prompts_per_step=2", "rollout.group_size=4", "validation.max_prompts=4", "validation.samples=1"]
    table = day.record.table(
        f"{steps} steps of the demo, held-out pages before → after",
        ["precision", "sampled accuracy", "sampled evidence", "greedy accuracy", "s/step", "mismatch, largest"],
    )
    for precision in ("float32", "bfloat16") if day.on_gpu else ("float32",):
        name = f"demo_{precision}"
        command(
            day,
            "rsgrpo.train",
            "recipe=demo",
            "cluster=inline",
            f"name={name}",
            f"total_steps={steps}",
            f"validation.every={steps}",
            f"checkpoint.every={steps}",
            f"learner.precision={precision}",
            f"rollout.dtype={precision}",
            "guards.action=warn",
            *on_device(day),
            *tolerant(day),
            *day.pick([], few),
        )
        found = read_metrics(day.work / "runs" / name)
        scores = [row for row in found if "val/sampled/accuracy" in row]
        taken = [row for row in found if "actor/loss" in row]
        before_after = [
            f"{scores[0][key]:.3f} → {scores[-1][key]:.3f}"
            for key in ("val/sampled/accuracy", "val/sampled/evidence", "val/greedy/accuracy")
        ]
        seconds = sorted(row["time/step"] for row in taken)[len(taken) // 2]
        day.record.row(table, precision, *before_after, seconds, max(row["actor/mismatch_max"] for row in taken))


def shaped(day: Day) -> None:
    """Take RL steps of a 3B-shaped model and record each phase."""
    images, image_tokens, words = day.pick((5, 2000, 880), (2, 16, 20))
    prompts, group, response = day.pick((4, 8, 256), (2, 4, 12))
    path = model_folder(day, "3b", image_tokens=image_tokens)
    data = rows(day.work / "rows_3b", 2 * prompts, images, image_tokens, words)
    record_steps(day, shaped_config(day, path, data, images, image_tokens, prompts, group, response), num_steps=3)


def shaped_config(
    day: Day, model: str, data: str, images: int, image_tokens: int, prompts: int, group: int, response: int
) -> Any:
    """Return the configuration of a run in one process whose last step is far away, so that it writes no checkpoint."""
    from rollout.config import InputsConfig, RolloutConfig
    from rsgrpo.config import train as config

    prompt_tokens = images * (image_tokens + 2) + day.pick(1500, 200)
    dtype: Any = "bfloat16" if day.on_gpu else "float32"
    return config.TrainConfig(
        name="shaped",
        output_dir=str(day.work / "runs"),
        total_steps=1000,
        rewards={"vowels": "benchmarks.gpu_day.rewards:vowels"},
        model=config.ModelConfig(path=model),
        data=config.DataConfig(train=data),
        inputs=InputsConfig(TOKEN_PIXELS, image_tokens * TOKEN_PIXELS, images, prompt_tokens),
        rollout=RolloutConfig(
            group_size=group, max_response_tokens=response, max_batch_sequences=prompts * group, dtype=dtype
        ),
        algorithm=config.AlgorithmConfig(prompts_per_step=prompts),
        learner=config.LearnerConfig(
            device="cuda" if day.on_gpu else "cpu",
            precision=dtype,
            lr=1e-6,
            max_tokens_per_micro_batch=prompt_tokens + group * response,
        ),
        validation=config.ValidationConfig(every=0, at_start=False),
        checkpoint=config.CheckpointConfig(every=1000, keep_best=0, resume="never", export=False),
        cluster=config.ClusterConfig(kind="inline"),
        tracking=config.TrackingConfig(store_rollouts=False),
    )


def record_steps(day: Day, config: Any, num_steps: int) -> None:
    """Take the first steps of a run, with its checks of learner and engine, and record them."""
    import shutil

    from rsgrpo.cluster.engine_check import EnginesDiffer
    from rsgrpo.running.run import Run, run_folder
    from rsgrpo.train import take_step

    shutil.rmtree(run_folder(config), ignore_errors=True)
    table = day.record.table(
        f"{config.algorithm.prompts_per_step} prompts x {config.rollout.group_size} responses of "
        f"{config.rollout.max_response_tokens} tokens",
        [
            "step",
            *(f"{phase} s" for phase in PHASES),
            "sampled tokens/s",
            "mismatch mean",
            "mismatch largest",
            "gradient norm",
        ],
    )
    with Run.open(config) as run:
        try:
            run.check_engines_if_due()
        except EnginesDiffer as error:  # a random model may hardly look at its pages
            day.record.note(f"Engine and learner: {error}".replace("\n", "; "))
        for step in run.steps_left[:num_steps]:
            take_step(run, step)
            row = read_metrics(run.folder)[-1]
            tokens = config.algorithm.prompts_per_step * config.rollout.group_size * row["rollout/num_tokens_mean"]
            day.record.row(
                table,
                float(step),
                *(row.get(f"time/{phase}") for phase in PHASES),
                tokens / row["time/sample"],
                row["actor/mismatch_mean"],
                row["actor/mismatch_max"],
                row["actor/grad_norm"],
            )
    if day.on_gpu:
        day.record.figure("peak of the whole process, GiB", torch.cuda.max_memory_allocated() / 2**30)
