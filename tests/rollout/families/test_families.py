"""What a family must do to be supported: shared and plain rows agree, the learner trains it, its export loads."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, AutoProcessor

from rollout.config import InputsConfig, RolloutConfig
from rollout.families import FAMILIES, family_of
from rollout.hf.engine import HFEngine
from rollout.inputs.images import PromptError
from rollout.inputs.processor import InputProcessor
from rollout.types import Prompt
from rsgrpo.config.train import LoraConfig, ModelConfig
from rsgrpo.errors import InputError
from rsgrpo.learning.packing import build_micro_batch
from rsgrpo.learning.policy import load_model
from rsgrpo.plan.model_sizes import sizes_of
from tests.laws.test_02_shared_prefix import assert_same, backward, encoded, groups_of, make_policy, plain_rows, row_of
from tests.material.gate import OneEngine, failures, run_gate
from tests.material.learner import INPUTS, learnt, make_groups, make_learner
from tests.material.tiny_families import save_family

OF_QWEN2 = {"model.embed_tokens", "model.layers", "model.norm", "visual.blocks", "visual.merger",
            "visual.patch_embed", "lm_head.weight"}  # fmt: skip
HUB_PREFIXES = {
    "qwen2_5_vl": OF_QWEN2,
    "qwen2_vl": OF_QWEN2,
    "qwen3_vl": {"model.language_model", "model.visual", "lm_head.weight"},
    "qwen3_5": {"model.language_model", "model.visual", "lm_head.weight"},
    "qwen3_vl_moe": {"model.language_model", "model.visual", "lm_head.weight"},
    "qwen3_5_moe": {"model.language_model", "model.visual", "lm_head.weight"},
    "internvl": {"model.language_model", "model.vision_tower", "model.multi_modal_projector", "lm_head.weight"},
    "glm4v": {"model.language_model", "model.visual", "lm_head.weight"},
}  # fmt: skip


@pytest.fixture(scope="module", params=HUB_PREFIXES)
def model_type(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def path(model_type, tiny_model_path, tmp_path_factory) -> str:
    if model_type == "qwen2_5_vl":  # the tests' own
        return tiny_model_path
    return save_family(model_type, tiny_model_path, tmp_path_factory.mktemp(f"tiny-{model_type}"))


@pytest.fixture(scope="module")
def processor(path) -> InputProcessor:
    return InputProcessor(path, InputsConfig(min_pixels=28 * 28, max_pixels=28 * 28 * 16))


def test_every_family_has_a_tiny_model():
    assert set(FAMILIES) == set(HUB_PREFIXES)


@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # of GLM's processor
@pytest.mark.parametrize(("height", "width"), [(57, 190), (400, 130), (300, 301), (56, 56), (30, 700)])
def test_an_image_becomes_as_many_tokens_as_transformers_processor_makes_of_it(height, width, path, processor):
    """Tokens and pixels; the pixels differ by the two libraries' rounding of one resize."""
    theirs = AutoProcessor.from_pretrained(path)
    limits = processor.family.limits(
        processor.image_processor, processor.inputs.min_pixels, processor.inputs.max_pixels
    )
    gradient = np.add.outer(np.linspace(0, 120, height), np.linspace(0, 130, width)).astype(np.uint8)
    image = Image.fromarray(gradient).convert("RGB")
    text = processor.template.prompt(Prompt("p", "a <image> b", ("p.png",)))
    expected = theirs(text=[text], images=[image], images_kwargs=limits, return_tensors="pt")
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    ours = processor.encode(Prompt("p", "a <image> b", (buffer.getvalue(),)))
    assert ours.token_ids_T == expected["input_ids"][0].tolist()
    assert processor.count_tokens(Prompt("p", "a <image> b", (buffer.getvalue(),))) == len(ours.token_ids_T)
    assert ours.pixel_values.shape == expected["pixel_values"].shape
    assert (ours.pixel_values - expected["pixel_values"]).abs().mean() < 0.02
    assert processor.collapsed(ours) == processor.token_ids(text)


def test_a_prompt_may_hold_no_token_of_an_image_or_of_a_turn(processor):
    family = processor.family
    for token in (*family.vision_tokens, *family.turn_tokens):
        if token in processor.tokenizer.get_vocab():
            with pytest.raises(PromptError, match="control token"):
                processor.template.prompt(Prompt("p", f"a {token} b"))
    banned = processor.tokenizer.convert_ids_to_tokens(processor.banned_token_ids)
    assert set(family.wrapper) <= set(banned)
    ends_by = processor.tokenizer.convert_ids_to_tokens(processor.eos_token_id)
    assert ends_by == (family.end_token or processor.tokenizer.eos_token)
    assert processor.eos_token_id not in processor.banned_token_ids
    talk = processor.template.observation("<image> more", 1, has_ended=False)
    assert talk.startswith(ends_by)


def test_an_unknown_family_is_refused_with_the_list():
    with pytest.raises(InputError, match="'llava' model; supported families are qwen2_vl, qwen2_5_vl, qwen3_vl, "):
        family_of("llava")


def test_a_learner_refuses_an_unknown_family_before_weights_load(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')  # a folder without weights
    with pytest.raises(InputError, match=r"'llava' model; supported families are .* a page on how to add"):
        load_model(ModelConfig(path=str(tmp_path)))


@pytest.mark.parametrize(("counts", "train_tower"), [([2, 0, 5], False), ([2, 0, 5], True), ([0], True)], ids=str)
def test_shared_equals_plain(counts, train_tower, path, processor, page_images):
    policy = make_policy(path, processor, train_tower=train_tower)
    groups = groups_of(processor, page_images, counts)
    plain, shared = backward(policy, plain_rows(groups)), backward(policy, [row_of(policy, groups)])
    if train_tower and not any(counts):  # the plain forward of text never runs the tower; here its gradient is zero
        tower = policy.family.vision_prefixes
        shared = (shared[0], {name: g for name, g in shared[1].items() if not name.startswith(tower)})
    assert_same(plain, shared)


def test_lora_gradients_equal_those_of_separate_rows(path, processor, page_images):
    policy = make_policy(path, processor, lora=4)
    groups = groups_of(processor, page_images, [2, 0])
    shared = backward(policy, [row_of(policy, groups)])
    assert all("lora_" in name and not name.startswith(policy.family.vision_prefixes) for name in shared[1])
    assert_same(backward(policy, plain_rows(groups)), shared)


def test_text_only_rows_beside_image_rows_in_one_step_are_as_if_alone(path, processor, page_images):
    """A row of text sees nothing of its neighbour's images, wherever it lies in the micro-batch."""
    policy = make_policy(path, processor).eval()
    groups = groups_of(processor, page_images, [0, 2, 0, 1])
    with torch.no_grad():
        together = policy(row_of(policy, groups), 1.0, False).logprobs_N
        alone = [policy(row_of(policy, [group]), 1.0, False).logprobs_N for group in groups]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=0)


def test_micro_batches_and_recomputed_layers_do_not_matter(path, page_images):
    """Law 1, on a step of text-only and image rows."""
    groups, found = make_groups(page_images, [1, 0, 2]), []
    for options in ({"gradient_checkpointing": "none"}, {"max_tokens_per_micro_batch": 130}):
        learner = make_learner(path, **options)
        metrics = learnt(learner.update(groups, [1.0, 1.0]))
        metrics.pop("actor/expert_load_max", None)  # of a micro-batch
        found.append((metrics, {name: tensor.clone() for name, tensor in learner.gather_weights()}))
    (one, weights), (other, again) = found
    assert one == pytest.approx(other, rel=1e-4, abs=1e-6)
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, again[name], atol=5e-6, rtol=1e-4)


def test_a_checkpoint_resumes_exactly(path, page_images, tmp_path):
    groups = make_groups(page_images, [1, 0])
    learner = make_learner(path)
    learner.update(groups, [1.0, 1.0])
    learner.save(tmp_path / "state")
    resumed = make_learner(path, self_check=False)
    resumed.load(tmp_path / "state")
    assert learnt(learner.update(groups, [1.0, 1.0])) == learnt(resumed.update(groups, [1.0, 1.0]))
    for (name, one), (_, other) in zip(learner.gather_weights(), resumed.gather_weights(), strict=True):
        assert torch.equal(one, other), name


def test_the_plan_counts_the_parameters_of_the_folder(path):
    sizes, _ = sizes_of(path)
    with safe_open(Path(path) / "model.safetensors", "pt") as file:
        stored = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118
    assert sizes.language_params + sizes.vision_params == stored


def test_the_gate_finds_engine_and_learner_equal_and_that_images_matter(path, page_images):
    engine = HFEngine(path, RolloutConfig(dtype="float32", num_threads=1), INPUTS)
    learner = make_learner(path)
    prompts = [group.prompt for group in make_groups(page_images, [2, 0])]
    assert failures(run_gate(OneEngine(engine), learner, prompts)) == set()


def test_features_from_inside_the_tower_matter(model_type, path, processor, page_images):
    if not model_type.startswith("qwen3_vl"):
        pytest.skip("this family's tower gives its output only")
    policy = make_policy(path, processor).eval()
    [(inputs, group)] = groups_of(processor, page_images, [2])
    prompt = encoded(policy, inputs)
    [features] = prompt.features
    assert features.shape[1] == 3 * 64
    with torch.no_grad():
        before = policy(build_micro_batch([(prompt, group)]), 1.0, False).logprobs_N
        features[:, 64:] = 0
        after = policy(build_micro_batch([(prompt, group)]), 1.0, False).logprobs_N
    assert not torch.allclose(before, after)


@pytest.mark.parametrize("lora", [0, 2])
def test_the_learner_trains_it_and_its_export_loads_and_has_the_hubs_names(
    lora, model_type, path, page_images, tmp_path
):
    learner = make_learner(path, lora=LoraConfig(rank=lora))
    metrics = learner.update(make_groups(page_images, [1, 0, 2]), [1.0, 1.0])
    assert metrics["actor/skipped"] == 0
    learner.export(tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert model.config.model_type == model_type
    named = dict(model.named_parameters())
    for name, tensor in learner.gather_weights():
        torch.testing.assert_close(learner.policy.family.published(name, named[name].data), tensor)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:  # the names that vLLM's loader maps
        prefixes = {".".join(name.split(".")[:2]) for name in file.keys()}  # noqa: SIM118
    assert prefixes == HUB_PREFIXES[model_type]
    assert AutoProcessor.from_pretrained(tmp_path).image_processor is not None
