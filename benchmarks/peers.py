"""One learner step of TRL's GRPOTrainer against ours: same weights, images, responses and rewards, in one run.

    python benchmarks/peers.py --setup .venv-peers        # once: an environment of its own, with TRL
    .venv-peers/bin/python benchmarks/peers.py --threads 1
    .venv-peers/bin/python benchmarks/peers.py --threads 1 --sweep

Both sides start from a model folder, image files and sampled responses, and end with an AdamW step (learning rate 0:
every repeat is the same step). TRL is driven through its public interface: `rollout_func` hands it the responses, a
reward function their rewards, callbacks read its clock and its gradients. Ours is set to the same algorithm: plain
GRPO, one scope on the whole response, means over tokens, no dual clip, no ban of vision tokens, TRL's epsilon.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

TRL = "trl==1.16.0"
PACKAGES = [TRL, "torchvision", "transformers>=5.16.1,<5.20", "peft>=0.19,<1"]


def set_up(folder: Path) -> None:
    """Make a virtual environment with torch (a CPU build where pip finds one), transformers and TRL."""
    python = str(folder / "bin" / "python")
    install = [python, "-m", "pip", "install", "-c", str(ROOT / "tools" / "constraints.txt")]
    for command in (
        [sys.executable, "-m", "venv", str(folder)],
        [*install, "torch"],  # alone: the rest then resolves against it
        [*install, *PACKAGES],
        [python, str(ROOT / "tools" / "torchvision_cpu_shim.py")],
    ):
        subprocess.run(command, check=True)


@dataclass(frozen=True)
class Work:
    """One step: images (each of `image_tokens`) and words per prompt, responses per prompt and their tokens."""

    prompts: int = 1
    images: int = 5
    image_tokens: int = 200
    words: int = 80
    group: int = 8
    response: int = 70


@dataclass
class Step:
    """What a side did: loss, gradients, CPU seconds of the step and of its part after scoring, peak bytes."""

    loss: float
    gradients: dict[str, Any]
    seconds: float
    learn_seconds: float
    peak_gib: float = 0.0


class Material:
    """A model folder, prompts with image files, responses and rewards."""

    def __init__(self, work: Work, folder: Path) -> None:
        import numpy as np
        from PIL import Image

        from recipes.demo.model import build_model, save_model_folder, train_tokenizer

        self.work, self.path = work, str(folder / "model")
        rng = np.random.default_rng(0)
        words = [f"w{index}" for index in range(200)]
        tokenizer = train_tokenizer([" ".join(words)] * 5, vocab_size=700)
        model = build_model(
            tokenizer, hidden_size=256, num_layers=8, num_heads=4, num_kv_heads=1, vision_depth=4, vocab_size=4096
        )
        side = 28 * 10
        self.max_pixels = side * 28 * (work.image_tokens // 10)
        save_model_folder(model, tokenizer, folder / "model", max_pixels=self.max_pixels)
        self.questions, self.images = [], []
        for prompt in range(work.prompts):
            self.questions.append(" ".join(rng.choice(words, work.words)))
            files = []
            for image in range(work.images):  # sizes that nobody needs to resize
                pixels = rng.integers(0, 255, (side, 28 * (work.image_tokens // 10), 3), dtype=np.uint8)
                files.append(str(folder / f"{prompt}-{image}.png"))
                Image.fromarray(pixels).save(files[-1])
            self.images.append(files)
        self.responses = rng.integers(0, 256, (work.prompts, work.group, work.response))
        self.rewards = rng.normal(size=(work.prompts, work.group))

    def advantages(self) -> Any:
        """Return TRL's: (prompts, group), with its epsilon of 1e-4, where ours is 1e-6."""
        mean, std = self.rewards.mean(1, keepdims=True), self.rewards.std(1, ddof=1, keepdims=True)
        return (self.rewards - mean) / (std + 1e-4)


def measure(run: Callable[..., list[Step]]) -> Step:
    """Return the fastest of several steps, and the peak of live tensors of one more."""
    from benchmarks.learner import PeakTensors

    steps = run(watch=None)
    fastest = min(steps, key=lambda step: step.seconds)
    gc.collect()
    peaks: list[PeakTensors] = []

    def watch(model: Any) -> Any:
        peaks.append(PeakTensors(model))
        return peaks[0]

    run(watch=watch)
    return replace(fastest, peak_gib=peaks[0].peak / 2**30)


def run_ours(material: Material, repeats: int, *, ban: bool, watch: Any = None) -> list[Step]:
    """Take steps with `rsgrpo.Learner`; nothing is kept from one to the next."""
    import numpy as np

    from rollout.config import InputsConfig
    from rollout.inputs.processor import InputProcessor
    from rollout.types import Prompt
    from rsgrpo.config.train import AlgorithmConfig, LearnerConfig, ModelConfig
    from rsgrpo.learning.learner import Learner
    from rsgrpo.types import Sample, TrainGroup

    inputs = InputsConfig(min_pixels=784, max_pixels=material.max_pixels)
    encoder = InputProcessor(material.path, inputs)
    if not ban:
        encoder.banned_token_ids = []
    learner = Learner(
        ModelConfig(path=material.path),
        LearnerConfig(
            device="cpu", precision="float32", lr=1e-30, weight_decay=0.0, max_grad_norm=1e9, vision_cache_mb=0,
            self_check=False,
        ),
        inputs,
        algorithm=AlgorithmConfig(dual_clip=0, advantage="grpo"),
        total_steps=10,
        encoder=encoder,
    )  # fmt: skip
    found: dict[str, Any] = {}

    def keep_gradients(*_: Any) -> None:
        weights: dict[str, Any] = learner.policy.trainable()
        found.update({name: weight.grad.full_tensor().clone() for name, weight in weights.items()})

    whole = np.ones((1, material.work.response), dtype=bool)

    def step(number: int) -> Step:
        groups = [
            TrainGroup(
                Prompt(f"{index}.{number}", "<image>" * len(material.images[index]) + question, tuple(images)),
                tuple(
                    Sample(tokens, whole, np.full(whole.shape, advantage, dtype=np.float32))
                    for tokens, advantage in zip(material.responses[index], advantages, strict=True)
                ),
            )
            for index, (question, images, advantages) in enumerate(
                zip(material.questions, material.images, material.advantages(), strict=True)
            )
        ]
        start = time.process_time()
        metrics = learner.update(groups, [1.0])
        seconds = time.process_time() - start
        return Step(metrics["actor/loss"], found, seconds, seconds)

    if watch is not None:
        with watch(learner.policy):
            return [step(0)]
    hook = learner._optimizer.adamw.register_step_pre_hook(keep_gradients)  # type: ignore[union-attr]
    step(-1)
    hook.remove()
    return [step(number) for number in range(repeats)]


class Recorded:
    """What TRL asks for while it samples: the same prompts, responses and rewards at every step.

    scored_at: CPU seconds of this process when rewards were last asked for.
    """

    def __init__(self, material: Material) -> None:
        from rollout.config import InputsConfig
        from rollout.inputs.processor import InputProcessor
        from rollout.types import Prompt

        self.material, self.scored_at = material, 0.0
        inputs = InputProcessor(material.path, InputsConfig(min_pixels=784, max_pixels=material.max_pixels))
        self.prompt_ids = [
            inputs.encode(Prompt("", "<image>" * len(images) + question, tuple(images))).token_ids_T
            for question, images in zip(material.questions, material.images, strict=True)
        ]
        self.rewards = {
            tuple(tokens): float(reward)
            for responses, values in zip(material.responses.tolist(), material.rewards, strict=True)
            for tokens, reward in zip(responses, values, strict=True)
        }

    def rollouts(self, prompts: Sequence[Any], trainer: Any) -> dict[str, Any]:
        """Return the recorded responses to `prompts`, which come group by group."""
        work = self.material.work
        order = [self.material.questions.index(text_of(prompt)) for prompt in prompts]
        return {
            "prompt_ids": [self.prompt_ids[p] for p in order],
            "completion_ids": [self.material.responses[p][i % work.group].tolist() for i, p in enumerate(order)],
            "logprobs": [[0.0] * work.response] * len(prompts),
        }

    def score(self, completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
        """Return the recorded reward of each response."""
        self.scored_at = time.process_time()
        return [self.rewards[tuple(tokens)] for tokens in completion_ids]


def make_clock(recorded: Recorded, *, keeps_gradients: bool) -> Any:
    """Return a callback whose `steps` are those that the trainer took."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.steps: list[Step] = []
            self.gradients: dict[str, Any] = {}

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.start = time.process_time()

        def on_pre_optimizer_step(self, *_: Any, **options: Any) -> None:
            if keeps_gradients and not self.steps:
                named = options["model"].named_parameters()
                self.gradients = {name: p.grad.clone() for name, p in named if p.grad is not None}

        def on_step_end(self, *_: Any, **__: Any) -> None:
            now = time.process_time()
            self.steps.append(Step(0.0, self.gradients, now - self.start, now - recorded.scored_at))

        def on_log(self, *_: Any, logs: dict[str, Any] | None = None, **__: Any) -> None:
            if logs and "loss" in logs:
                self.steps[-1].loss = float(logs["loss"])

    return Clock()


def run_trl(material: Material, repeats: int, *, rows: int, folder: Path, watch: Any = None) -> list[Step]:
    """Take steps with GRPOTrainer, `rows` responses in each of its micro-batches."""
    import contextlib

    from datasets import Dataset, Image, List
    from transformers import AutoModelForImageTextToText, AutoProcessor, PrinterCallback
    from trl import GRPOConfig, GRPOTrainer

    work = material.work
    model = AutoModelForImageTextToText.from_pretrained(material.path, attn_implementation="sdpa")
    model.model.visual.requires_grad_(False)
    recorded = Recorded(material)
    clock = make_clock(recorded, keeps_gradients=watch is None)
    dataset = Dataset.from_list(
        [
            {"prompt": [{"role": "user", "content": question}], "images": images}
            for question, images in zip(material.questions, material.images, strict=True)
        ]
    ).cast_column("images", List(Image()))
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=recorded.score,
        args=GRPOConfig(
            output_dir=str(folder / "trl"), report_to="none", save_strategy="no", logging_steps=1, disable_tqdm=True,
            use_cpu=True, bf16=False, max_steps=1 if watch else repeats + 1, learning_rate=0.0, weight_decay=0.0,
            max_grad_norm=0.0, per_device_train_batch_size=rows,
            gradient_accumulation_steps=work.prompts * work.group // rows, num_generations=work.group,
            max_completion_length=work.response, shuffle_dataset=False, temperature=1.0, beta=0.0, loss_type="dapo",
            epsilon=0.2, epsilon_high=0.28, scale_rewards="group", gradient_checkpointing=True,
        ),
        train_dataset=dataset,
        processing_class=AutoProcessor.from_pretrained(material.path),
        rollout_func=recorded.rollouts,
        callbacks=[clock],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    with watch(model) if watch else contextlib.nullcontext():
        trainer.train()
    for step in clock.steps:
        step.loss = clock.steps[0].loss
    return clock.steps[0 if watch else 1 :]  # the first one warms up


def text_of(prompt: Any) -> str:
    """Return the question of a conversational prompt, its content a string or a list of parts."""
    content = prompt[-1]["content"]
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")


def difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Return the largest relative difference of a parameter's gradient."""
    assert one.keys() == other.keys(), sorted(one.keys() ^ other.keys())
    return max(float((one[name] - other[name]).norm() / (other[name].norm() + 1e-12)) for name in other)


def compare(work: Work, repeats: int) -> dict[str, Any]:
    """Run all sides on one piece of work; check them equal; return their figures."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        material = Material(work, folder)
        sides = {"ours": measure(functools.partial(run_ours, material, repeats, ban=False))}
        for rows in sorted({1, work.group}):
            key = f"trl, {rows} row{'s' if rows > 1 else ''} at a time"
            sides[key] = measure(functools.partial(run_trl, material, repeats, rows=rows, folder=folder))
        banned = run_ours(material, 1, ban=True)[0]
    ours = sides["ours"]
    return {
        "work": asdict(work),
        "sides": {
            key: {k: getattr(side, k) for k in ("seconds", "learn_seconds", "peak_gib", "loss")}
            for key, side in sides.items()
        },
        "gradients": {key: difference(ours.gradients, s.gradients) for key, s in sides.items() if key != "ours"},
        "gradients, vision tokens banned": difference(banned.gradients, ours.gradients),
    }


def show(found: dict[str, Any]) -> None:
    """Print one comparison as a table."""
    ours = found["sides"]["ours"]
    print(f"\n{found['work']}")
    print("| side | step s | after scoring s | peak GiB | step / ours | after scoring / ours | peak / ours |")
    print("|---|---|---|---|---|---|---|")
    for name, row in found["sides"].items():
        ratios = " | ".join(f"{row[key] / ours[key]:.1f}" for key in ("seconds", "learn_seconds", "peak_gib"))
        print(f"| {name} | {row['seconds']:.2f} | {row['learn_seconds']:.2f} | {row['peak_gib']:.2f} | {ratios} |")
    losses = ", ".join(f"{name} {row['loss']:.6f}" for name, row in found["sides"].items())
    gradients = ", ".join(f"{name} {value:.1e}" for name, value in found["gradients"].items())
    print(f"loss: {losses}; largest relative difference of a gradient from ours: {gradients}")
    print(
        f"by design: our ban of vision tokens moves a gradient by {found['gradients, vision tokens banned']:.1e}",
        flush=True,
    )


SWEEP: list[dict[str, int]] = [
    {"words": 80}, {"words": 600}, {"words": 1200}, {"group": 2}, {"group": 4}, {"group": 16}, {"images": 1},
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setup", type=Path, metavar="FOLDER", help="make the environment in FOLDER and stop")
    for name, value in asdict(Work()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--sweep", action="store_true", help="several prompt lengths, group sizes and image counts")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()
    if args.setup:
        set_up(args.setup)
        return
    import datasets
    import torch
    import transformers

    torch.set_num_threads(args.threads)
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "trl")}
    print(f"{versions}, {args.threads} CPU thread(s), {platform.machine()}", flush=True)
    work = Work(**{name: getattr(args, name) for name in asdict(Work())})
    results = []
    for change in SWEEP if args.sweep else [{}]:
        results.append(compare(replace(work, **change), args.repeats))
        show(results[-1])
    if args.json:
        args.json.write_text(json.dumps({"versions": versions, "results": results}, indent=2))


if __name__ == "__main__":
    main()
