"""The gate between engines and learner: it holds when they agree, and names what differs when they do not."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from rollout.config import InputsConfig, RolloutConfig, TurnsConfig
from rollout.fake import FakeEngine
from rollout.hf.engine import HFEngine
from rollout.types import Prompt
from rsgrpo.cluster.engine_check import (
    EnginesDiffer,
    _agreement,
    blanked,
    choose_prompts,
    compare_turns,
    count_pages,
    images_shown,
    require_agreement,
    table,
    tolerance_of,
)
from rsgrpo.config.train import LearnerConfig, TrainConfig
from rsgrpo.errors import RsgrpoError
from tests.material.gate import OneEngine, failures, one_learner, run_gate

INPUTS = InputsConfig(min_pixels=784, max_pixels=784 * 16, max_images=3, max_prompt_tokens=400)
ROLLOUT = RolloutConfig(num_threads=1, max_batch_sequences=8)


@pytest.fixture(scope="module")
def model_path(attentive_model_path):
    return attentive_model_path


@pytest.fixture(scope="module")
def learner(model_path):
    return one_learner(model_path, INPUTS)


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


def test_the_rows_with_most_images_are_compared(prompts):
    assert [prompt.id for prompt in prompts] == ["three", "two"]


def test_engine_and_learner_with_the_same_weights_agree(engine, learner, prompts):
    checks = run_gate(OneEngine(engine), learner, prompts)
    assert failures(checks) == set(), table(checks)
    assert len(checks) == 2 * 6 + 2
    require_agreement(checks, 0)


def test_stale_weights_are_caught_by_version_or_by_value(engine, learner, prompts):
    assert failures(run_gate(OneEngine(engine), learner, prompts, version=1)) == {"weights version"}
    moved = {name: tensor + 0.02 * torch.randn_like(tensor) for name, tensor in engine._model.state_dict().items()}
    engine.load_weights(moved.items())
    engine.finish_weights(1)
    checks = run_gate(OneEngine(engine), learner, prompts, version=1)
    assert "log-probabilities differ by" in failures(checks)
    with pytest.raises(EnginesDiffer, match=r"(?s)checks .*failed \(weights version 1\).*!!.*engine 0, three"):
        require_agreement(checks, 1)


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
    assert issubclass(EnginesDiffer, RsgrpoError)


@pytest.mark.parametrize(
    ("differences", "tolerance", "holds"),
    [
        ([0.02] * 31 + [0.8], 0.3, [True, True]),  # one unlikely token, as bfloat16 rounds
        ([0.02] * 31 + [0.95], 0.3, [True, False]),
        ([0.12] * 32, 0.3, [False, True]),  # every token a little: not rounding
        ([0.0] * 31 + [2e-4], 1e-4, [False]),
    ],
)
def test_bfloat16_may_move_a_token_but_not_the_mean(differences, tolerance, holds):
    theirs_T = np.linspace(-3, -0.1, 32)
    checks = _agreement("engine 0", theirs_T + np.array(differences), theirs_T, tolerance)
    assert [check.holds for check in checks] == holds


@pytest.fixture(scope="module")
def talking(model_path):
    turns = TurnsConfig(environment="tests.material.environments:Slow")
    return HFEngine(model_path, dataclasses.replace(ROLLOUT, turns=turns), INPUTS, num_threads=1)


def test_the_pages_of_every_turn_reach_engine_and_learner(talking, learner, prompts):
    checks = compare_turns(OneEngine(talking), learner, prompts[0], tolerance=1e-4)
    checks += count_pages(OneEngine(talking), learner, prompts[0])
    assert failures(checks) == set(), table(checks)
    read = {check.what: check.found for check in checks if check.what.startswith("pages read")}
    assert read == {"pages read after turn 1": "1", "pages read after turn 2": "2"}
    assert len(checks) == 1 + 2 * 3 + 2 * 2


def test_the_pages_of_a_check_stay_within_the_limits_of_the_run():
    assert images_shown(TurnsConfig()) == (1, 2)
    assert images_shown(TurnsConfig(max_images=2)) == (1, 1)
    assert images_shown(TurnsConfig(max_images=1)) == (1,)
    assert images_shown(TurnsConfig(max_images=0)) == images_shown(TurnsConfig(max_turns=1)) == ()
    assert images_shown(TurnsConfig(max_turns=2)) == (1,)


@pytest.mark.parametrize("blind_turn", [1, 2])
def test_a_page_of_any_turn_that_the_engine_never_sees_is_caught(talking, learner, prompts, monkeypatch, blind_turn):
    """What slime 1847 reports: the policy does not see images after the first turn."""
    encode = talking.processor.encode_observation

    def blind(text, images, **options):
        grey = blanked(dataclasses.replace(prompts[0], images=images)).images
        return encode(text, grey if len(images) == blind_turn else images, **options)

    monkeypatch.setattr(talking.processor, "encode_observation", blind)
    found = failures(compare_turns(OneEngine(talking), learner, prompts[0], tolerance=1e-4))
    unseen = f"blanking the pages of turn {blind_turn} changes what follows by"
    assert found == {"log-probabilities differ by", unseen}


def test_an_engine_that_resizes_a_tools_page_otherwise_is_caught(talking, learner, prompts, monkeypatch):
    """What verl 3708 reports: image features and image tokens differ in number once a tool returns an image."""
    monkeypatch.setattr(talking.processor, "inputs", dataclasses.replace(INPUTS, max_pixels=28 * 28 * 2))
    with pytest.raises(RsgrpoError, match="image tokens"):
        compare_turns(OneEngine(talking), learner, prompts[0], tolerance=1e-4)
    wrong = [check for check in count_pages(OneEngine(talking), learner, prompts[0]) if not check.holds]
    assert {check.what for check in wrong} == {f"image tokens, image features of turn {turn}" for turn in (1, 2)}
    assert {check.where for check in wrong} == {"engine 0"}


def test_a_page_that_is_over_the_limit_of_an_episode_is_not_compared(model_path, learner, prompts):
    turns = TurnsConfig(environment="tests.material.environments:Slow", max_observation_tokens=40)
    engine = HFEngine(model_path, dataclasses.replace(ROLLOUT, turns=turns), INPUTS, num_threads=1)
    checks = compare_turns(OneEngine(engine), learner, prompts[0], tolerance=1e-4)
    assert failures(checks) == set(), table(checks)
    compared = "pages read after turn 1", "blanking the pages of turn 1 changes what follows by"
    assert {check.what for check in checks} == {"log-probabilities differ by", *compared}
