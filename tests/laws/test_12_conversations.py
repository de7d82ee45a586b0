"""Law 12: responses with observations have the log-probabilities and gradients of one plain row per response.

Caught here: image tokens and features that differ once a tool returns an image, a second image that is never seen,
positions that do not go on behind an image, and observation tokens that are trained on.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from rollout.config import RolloutConfig, TurnsConfig
from rollout.families import FAMILIES
from rollout.hf.engine import HFEngine
from rollout.types import Prompt, SamplingParams
from rsgrpo.config.train import AlgorithmConfig
from rsgrpo.learning.learner import Learner
from rsgrpo.learning.policy import PlainRow
from rsgrpo.types import RsgrpoError, Sample, TrainGroup
from tests.laws.test_01_micro_batches_and_ranks import difference, weights_of
from tests.laws.test_02_shared_prefix import assert_same
from tests.material.environments import conversation
from tests.material.learner import INPUTS, learnt, make_conversations, make_learner
from tests.material.tiny_families import save_family


def naive_rows(processor: Any, groups: Sequence[TrainGroup]) -> list[PlainRow]:
    """Return one row per response for transformers' own forward, built without the learner's code."""
    rows = []
    for group in groups:
        for sample in group.samples:
            ids, is_sampled, pixels, grids = conversation(processor, group.prompt, sample)
            rows.append(
                PlainRow(
                    torch.tensor(ids),
                    torch.tensor(is_sampled).nonzero()[:, 0],
                    torch.cat(pixels) if pixels else None,
                    torch.cat(grids) if grids else None,
                )
            )
    return rows


def gradients(learner: Learner, groups: Sequence[TrainGroup], rows: Sequence[PlainRow] | None):
    """Return logprobs of every response and the gradient of a weighted sum of them, over shared or naive rows."""
    policy, passes = learner.policy.train(), learner._passes
    weights = torch.randn(1000, generator=torch.Generator().manual_seed(1))
    order: list[tuple[int, int]]
    batches: list[Any]
    if rows is None:
        [packing] = passes.pack(groups, [range(len(groups))])
        made = list(passes._micro_batches(groups, packing, None, replays=False))
        order = [key for keys, _ in made for key in keys]
        batches = [batch for _, batch in made]
    else:
        order, batches = [(g, s) for g, group in enumerate(groups) for s in range(len(group.samples))], list(rows)
    policy.zero_grad()
    found = torch.cat([policy(batch, 1.0, False).logprobs_N for batch in batches])
    pieces = torch.split(found, [len(groups[g].samples[s].token_ids_T) for g, s in order])
    by_response = dict(zip(order, pieces, strict=True))
    logprobs = torch.cat([by_response[key] for key in sorted(by_response)])
    (logprobs * weights[: len(logprobs)]).sum().backward()
    named = {name: p.grad.clone() for name, p in policy.hf.named_parameters() if p.grad is not None}
    policy.zero_grad()
    return logprobs.detach(), named


@pytest.fixture(scope="module", params=FAMILIES)
def path(request, tiny_model_path, tmp_path_factory) -> str:
    if request.param == "qwen2_5_vl":
        return tiny_model_path
    return save_family(request.param, tiny_model_path, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("freeze_vision", [True, False])
def test_logprobs_and_gradients_are_those_of_naive_rows(freeze_vision, path, page_images):
    learner = make_learner(path, freeze_vision=freeze_vision, gradient_checkpointing="none")
    processor = learner.encoder
    groups = make_conversations(processor, page_images, [2, 0, 1])
    naive = gradients(learner, groups, naive_rows(processor, groups))
    assert_same(naive, gradients(learner, groups, None))
    prefixes = learner.policy.family.vision_prefixes
    tower = [gradient.norm() for name, gradient in naive[1].items() if name.startswith(prefixes)]
    assert bool(tower) != freeze_vision
    found = torch.cat([torch.from_numpy(logprobs_T) for group in learner.logprobs(groups) for logprobs_T in group])
    assert (found - naive[0]).abs().max() < 1e-5


@pytest.mark.parametrize(
    "options", [{"max_tokens_per_micro_batch": 200}, {"vision_cache_mb": 0, "encode_ahead": 1}], ids=str
)
def test_an_update_does_not_depend_on_how_the_work_is_cut(options, tiny_model_path, page_images):
    algorithm = AlgorithmConfig(on_policy_shortcut=False)
    whole = make_learner(tiny_model_path, algorithm=algorithm, max_tokens_per_micro_batch=100_000)
    groups = make_conversations(whole.encoder, page_images, [1, 0])
    start, metrics = weights_of(whole), whole.update(groups, [1.0, 2.0])
    cut = make_learner(tiny_model_path, algorithm=algorithm, **options)
    assert learnt(cut.update(groups, [1.0, 2.0])) == pytest.approx(learnt(metrics), rel=1e-5, abs=1e-6)
    assert difference(weights_of(whole), weights_of(cut), start) < 1e-5


def test_an_image_of_any_observation_matters_to_what_follows_and_to_nothing_before(attentive_model_path, page_images):
    learner = make_learner(attentive_model_path)
    [group] = make_conversations(learner.encoder, page_images, [1])
    sample = group.samples[1]
    [[before]] = learner.logprobs([TrainGroup(group.prompt, (sample,))])
    for index, observation in enumerate(sample.observations):
        for image in range(len(observation.images)):
            images = list(observation.images)
            images[image] = blank_like(str(images[image]))
            observations = list(sample.observations)
            observations[index] = dataclasses.replace(observation, images=tuple(images))
            changed = dataclasses.replace(sample, observations=tuple(observations))
            [[after]] = learner.logprobs([TrainGroup(group.prompt, (changed,))])
            np.testing.assert_array_equal(after[: observation.at], before[: observation.at])
            assert np.abs(after[observation.at :] - before[observation.at :]).max() > 1e-3


def blank_like(page: str) -> bytes:
    with Image.open(page) as image:
        blank = Image.new("RGB", image.size, "white")
    held = io.BytesIO()
    blank.save(held, "PNG")
    return held.getvalue()


def test_images_as_paths_bytes_and_references_are_the_same_images(tiny_model_path, page_images):
    @dataclasses.dataclass(frozen=True)
    class Reference:
        name: str

        def read(self) -> bytes:
            return Path(self.name).read_bytes()

    learner = make_learner(tiny_model_path)
    results = []
    for kind in (str, Reference, lambda page: Path(page).read_bytes()):
        pages = [kind(page) for page in page_images]
        results.append(learner.logprobs(make_conversations(learner.encoder, pages, [1])))
    for others in results[1:]:
        for mine, theirs in zip(results[0][0], others[0], strict=True):
            np.testing.assert_array_equal(mine, theirs)


def test_an_observation_whose_image_changed_since_it_was_read_is_refused_with_both_numbers(
    tiny_model_path, page_images
):
    learner = make_learner(tiny_model_path)
    [group] = make_conversations(learner.encoder, page_images, [1])
    sample = group.samples[1]
    swapped = [dataclasses.replace(sample.observations[0], images=(page_images[0],)), *sample.observations[1:]]
    broken = TrainGroup(group.prompt, (dataclasses.replace(sample, observations=tuple(swapped)),))
    with pytest.raises(RsgrpoError, match=r"group p0, sample 0: .* has 9 image tokens, but its 1 images become 6 feat"):
        learner.update([broken], [1.0, 1.0])


def test_observations_in_disorder_are_refused(tiny_model_path, page_images):
    learner = make_learner(tiny_model_path)
    [group] = make_conversations(learner.encoder, page_images, [0])
    backwards = dataclasses.replace(group.samples[1], observations=group.samples[1].observations[::-1])
    with pytest.raises(RsgrpoError, match="observations must be in the order of its tokens"):
        learner.update([TrainGroup(group.prompt, (backwards,))], [1.0, 1.0])


@pytest.mark.parametrize("model_type", ["qwen2_5_vl", "qwen3_vl", "qwen3_5"])
def test_what_the_engine_sampled_is_what_the_learner_scores(model_type, tiny_model_path, page_images, tmp_path):
    path = tiny_model_path if model_type == "qwen2_5_vl" else save_family(model_type, tiny_model_path, tmp_path)
    arguments = {"pages": list(page_images), "stop": ["e", "a", "1"]}
    turns = TurnsConfig(environment="tests.material.environments:Pages", arguments=arguments)
    engine = HFEngine(path, RolloutConfig(dtype="float32", num_threads=1, turns=turns), INPUTS)
    learner = make_learner(path, temperature=0.8)
    prompts = [Prompt("one", "<image>what is the code?", (page_images[1],)), Prompt("none", "which page?")]
    sampling = SamplingParams(group_size=6, temperature=0.8, max_tokens=60, seed=3)
    sampled = list(engine.generate(prompts, sampling))
    groups = []
    for one in sampled:
        samples = []
        for rollout in one.rollouts:
            nothing = np.zeros((1, len(rollout.token_ids_T)))
            tokens_T, engine_T = np.array(rollout.token_ids_T), np.array(rollout.logprobs_T, dtype=np.float32)
            samples.append(
                Sample(tokens_T, nothing.astype(bool), nothing.astype(np.float32), engine_T, None, rollout.observations)
            )
        groups.append(TrainGroup(one.prompt, tuple(samples)))
    read = [observation for group in groups for sample in group.samples for observation in sample.observations]
    assert {len(observation.images) for observation in read} >= {0, 1, 2, 3}
    for group, found in zip(groups, learner.logprobs(groups), strict=True):
        for sample, logprobs_T in zip(group.samples, found, strict=True):
            assert sample.rollout_logprobs_T is not None
            np.testing.assert_allclose(logprobs_T, sample.rollout_logprobs_T, atol=1e-4)
