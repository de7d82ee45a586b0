"""The gate between engines and learner: it holds when they agree, and names what differs when they do not."""

from __future__ import annotations

import dataclasses
import shutil
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForImageTextToText

from rollout.config import InputsConfig, RolloutConfig
from rollout.fake import FakeEngine
from rollout.hf_engine import HFEngine
from rollout.types import Prompt
from rsgrpo.config import LearnerConfig, ModelConfig, TrainConfig
from rsgrpo.errors import RsgrpoError
from rsgrpo.gate import GateFailed, blanked, check_gate, choose_prompts, require_gate, table, tolerance_of
from rsgrpo.learner import Learner

INPUTS = InputsConfig(min_pixels=784, max_pixels=784 * 16, max_images=3, max_prompt_tokens=400)
ROLLOUT = RolloutConfig(num_threads=1, max_batch_sequences=8)


class OneEngine:
    """An engine of this process, asked as a pool is."""

    def __init__(self, engine, seen=lambda prompt: prompt):
        self.engine = engine
        self.seen = seen

    def generate_on_each(self, prompts, sampling):
        groups = {group.prompt.id: group for group in self.engine.generate([self.seen(p) for p in prompts], sampling)}
        return [[groups[prompt.id] for prompt in prompts]]

    def call(self, method, *args):
        return [getattr(self.engine, method)(*args)]


@pytest.fixture(scope="module")
def model_path(tiny_model_path, tmp_path_factory):
    """The tiny model that attends strongly to strong image features: a random model hardly looks at them otherwise."""
    folder = tmp_path_factory.mktemp("gate") / "model"
    shutil.copytree(tiny_model_path, folder)
    model = AutoModelForImageTextToText.from_pretrained(tiny_model_path, dtype=torch.float32)
    with torch.no_grad():
        model.model.visual.merger.mlp[2].weight *= 30
        for layer in model.model.language_model.layers:
            layer.self_attn.v_proj.weight *= 10
            layer.self_attn.o_proj.weight *= 10
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def learner(model_path):
    settings = LearnerConfig(
        device="cpu", precision="float32", num_threads=1, gradient_checkpointing="none", max_tokens_per_micro_batch=1024
    )
    learner = Learner(ModelConfig(path=model_path), settings, INPUTS, total_steps=1)
    return SimpleNamespace(call=lambda method, *args: getattr(learner, method)(*args))


@pytest.fixture
def engine(model_path):
    return HFEngine(model_path, ROLLOUT, INPUTS, num_threads=1)


@pytest.fixture
def prompts(page_images):
    rows = [
        Prompt("none", "insufficient to answer?"),
        Prompt("one", "what code is on <image>?", (page_images[4],)),
        Prompt("three", "<image> and <image> or <image> what amount is on page 2?", tuple(page_images[:3])),
        Prompt("two", "<image><image> page 1", tuple(page_images[1:3])),
    ]
    return choose_prompts(rows, 2)


def run_gate(engines, learner, prompts, version=0):
    return check_gate(engines, learner, prompts, num_tokens=12, tolerance=1e-4, version=version)


def failures(checks):
    return {check.what for check in checks if not check.holds}


def test_the_rows_with_most_images_are_compared(prompts):
    assert [prompt.id for prompt in prompts] == ["three", "two"]


def test_engine_and_learner_with_the_same_weights_agree(engine, learner, prompts):
    checks = run_gate(OneEngine(engine), learner, prompts)
    assert failures(checks) == set(), table(checks)
    assert len(checks) == 2 * 6 + 2
    require_gate(checks, 0)


def test_stale_weights_are_caught_by_version_or_by_value(engine, learner, prompts):
    assert failures(run_gate(OneEngine(engine), learner, prompts, version=1)) == {"weights version"}
    moved = {name: tensor + 0.02 * torch.randn_like(tensor) for name, tensor in engine._model.state_dict().items()}
    engine.load_weights(moved.items())
    engine.finish_weights(1)
    checks = run_gate(OneEngine(engine), learner, prompts, version=1)
    assert "log-probabilities differ by" in failures(checks)
    with pytest.raises(GateFailed, match=r"(?s)checks .*failed \(weights version 1\).*!!.*engine 0, three"):
        require_gate(checks, 1)


def test_an_engine_that_never_sees_the_images_is_caught(engine, learner, prompts):
    grey = OneEngine(engine, seen=lambda p: dataclasses.replace(blanked(p), id=p.id))
    assert {"blank pages change its answer by", "log-probabilities differ by"} <= failures(
        run_gate(grey, learner, prompts)
    )


def test_an_engine_with_other_pixels_is_caught(model_path, learner, prompts):
    smaller = dataclasses.replace(INPUTS, max_pixels=784 * 4)
    checks = run_gate(OneEngine(HFEngine(model_path, ROLLOUT, smaller, num_threads=1)), learner, prompts)
    assert {"prompt tokens, image tokens", "log-probabilities differ by"} <= failures(checks)


def test_pages_in_another_order_are_caught_though_all_counts_agree(engine, learner, page_images):
    prompts = [Prompt("same sizes", "<image><image> page 1", (page_images[0], page_images[0]))]
    flipped = blanked(prompts[0]).images
    swapped = OneEngine(engine, seen=lambda p: dataclasses.replace(p, images=(flipped[0], p.images[1])))
    assert failures(run_gate(swapped, learner, prompts)) & {
        "log-probabilities differ by",
        "greedy token below the best",
    }


def test_a_prompt_that_an_engine_cannot_sample_is_a_failure(learner, model_path, prompts):
    script = dataclasses.replace(ROLLOUT, engine="fake", script="")
    checks = run_gate(OneEngine(FakeEngine(model_path, script, INPUTS)), learner, prompts)
    assert "its row has no gold answer" in table(checks)
    assert failures(checks) == {"is sampled"}


def test_tolerances_follow_the_precision():
    exact = TrainConfig(learner=LearnerConfig(precision="float32"), rollout=RolloutConfig(dtype="float32"))
    assert tolerance_of(exact) == 1e-4
    assert tolerance_of(dataclasses.replace(exact, rollout=RolloutConfig(dtype="bfloat16"))) == 0.3
    assert tolerance_of(dataclasses.replace(exact, gate=dataclasses.replace(exact.gate, tolerance=0.01))) == 0.01
    assert issubclass(GateFailed, RsgrpoError)
