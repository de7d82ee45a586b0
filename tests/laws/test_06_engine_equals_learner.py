"""Law 6: after a weight sync an engine's greedy tokens and log-probabilities are the learner's, for every family."""

from __future__ import annotations

import numpy as np
import pytest

from rollout.config import RolloutConfig
from rollout.families import FAMILIES
from rollout.hf.engine import HFEngine
from rollout.types import SamplingParams
from rsgrpo.types import Sample, TrainGroup
from tests.material.learner import INPUTS, make_groups, make_learner
from tests.material.tiny_families import save_family


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("freeze_vision", [True, False])
def test_the_embedded_engine_follows_an_update(freeze_vision, model_type, tiny_model_path, page_images, tmp_path):
    path = tiny_model_path if model_type == "qwen2_5_vl" else save_family(model_type, tiny_model_path, tmp_path)
    engine = HFEngine(path, RolloutConfig(dtype="float32", num_threads=1), INPUTS)
    learner = make_learner(path, freeze_vision=freeze_vision)
    prompts = [group.prompt for group in make_groups(page_images, [0, 2, 5])]
    greedy = SamplingParams(temperature=0.0, max_tokens=6)
    before = {group.prompt.id: group.rollouts[0] for group in engine.generate(prompts, greedy)}
    learner.update(make_groups(page_images, [1, 2, 3]), [1.0, 1.0])
    engine.load_weights(learner.gather_weights())
    engine.finish_weights(1)
    sampled = list(engine.generate(prompts, greedy))
    groups = []
    for group in sampled:
        tokens_T = np.array(group.rollouts[0].token_ids_T)
        nothing = np.zeros((1, len(tokens_T)))
        groups.append(TrainGroup(group.prompt, (Sample(tokens_T, nothing.astype(bool), nothing.astype(np.float32)),)))
    for group, [logprobs_T] in zip(sampled, learner.logprobs(groups), strict=True):
        np.testing.assert_allclose(group.rollouts[0].logprobs_T, logprobs_T, atol=1e-4)
        assert group.rollouts[0].logprobs_T != before[group.prompt.id].logprobs_T
    assert learner.supervised_loss(groups)["actor/top1_frac"] == pytest.approx(1.0)
