"""The learner on one rank: steps, skips, schedules, state on disk and export."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from rsgrpo.config.train import AlgorithmConfig, LoraConfig
from rsgrpo.learning.fsdp import give_back
from rsgrpo.learning.optimizer import lr_factor, merge_updates
from rsgrpo.learning.passes import check_groups
from rsgrpo.types import RsgrpoError, Sample, TrainGroup
from tests.laws.test_01_micro_batches_and_ranks import difference, weights_of
from tests.material.learner import learnt, make_groups, make_learner

WEIGHTS = [1.0, 2.0]
CUDA = torch.device("cuda")


def test_an_update_moves_the_weights_and_reports_what_it_did(tiny_model_path, groups):
    learner = make_learner(tiny_model_path)
    before = weights_of(learner)
    metrics = learner.update(groups, WEIGHTS)
    after = weights_of(learner)
    assert learner.weights_version == 1
    assert all(not torch.equal(before[name], after[name]) for name in before if "embed" not in name)
    assert not any("visual" in name for name in before)
    assert metrics["actor/skipped"] == 0
    assert metrics["actor/active_terms"] == 2
    assert metrics["actor/old_kl"] == 0  # on-policy: old is new
    assert metrics["actor/grad_norm"] > 0
    assert metrics["actor/mismatch_max"] >= metrics["actor/mismatch_mean"] > 0
    assert 5.0 < metrics["actor/entropy"] < np.log(400)


def test_a_checkpoint_before_the_first_update_resumes_bit_for_bit(tiny_model_path, groups, tmp_path):
    """Torch takes an optimiser step of its own to write an empty state, which must neither be saved nor stay."""

    def after_two_updates(learner) -> dict[str, torch.Tensor]:
        for _ in range(2):
            learner.update(groups, WEIGHTS)
        return weights_of(learner)

    straight = after_two_updates(make_learner(tiny_model_path))
    saved, resumed = make_learner(tiny_model_path), make_learner(tiny_model_path)
    saved.save(tmp_path / "step_0")
    resumed.load(tmp_path / "step_0")
    for learner in (saved, resumed):
        for name, weight in after_two_updates(learner).items():
            assert torch.equal(weight, straight[name]), name


def test_a_trained_tower_moves_at_its_own_rate(tiny_model_path, groups):
    results = {}
    for scale in (1.0, 0.5):
        learner = make_learner(tiny_model_path, freeze_vision=False, vision_lr_scale=scale, weight_decay=0.0)
        before = weights_of(learner)
        learner.update(groups, WEIGHTS)
        results[scale] = {name: tensor - before[name] for name, tensor in weights_of(learner).items()}
    tower, head = "model.visual.merger.mlp.0.weight", "lm_head.weight"
    assert results[1.0][tower].norm() > 0
    torch.testing.assert_close(results[0.5][tower], 0.5 * results[1.0][tower], rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(results[0.5][head], results[1.0][head])


def test_without_the_shortcut_old_logprobs_are_computed_and_change_nothing_on_policy(tiny_model_path, groups):
    shortcut = make_learner(tiny_model_path)
    start = weights_of(shortcut)
    shortcut.update(groups, WEIGHTS)
    passed = make_learner(tiny_model_path, algorithm=AlgorithmConfig(on_policy_shortcut=False))
    passed.update(groups, WEIGHTS)
    assert difference(weights_of(shortcut), weights_of(passed), start) < 1e-5


def test_several_updates_share_a_batch_and_later_ones_are_off_policy(tiny_model_path, groups):
    learner = make_learner(tiny_model_path, algorithm=AlgorithmConfig(updates_per_step=2))
    metrics = learner.update(groups, WEIGHTS)
    assert learner.weights_version == 2
    assert metrics["actor/old_kl"] != 0
    assert metrics["actor/active_terms"] == 2


def test_every_algorithm_option_takes_a_finite_step(tiny_model_path, groups):
    algorithm = AlgorithmConfig(ratio="cispo", kl_coef=0.1, entropy_coef=0.01, importance_cap=2.0)
    learner = make_learner(tiny_model_path, algorithm=algorithm)
    reference = make_learner(tiny_model_path, trainable=False)
    ref_logprobs = reference.logprobs(groups)
    with_reference = [
        TrainGroup(
            g.prompt, tuple(dataclasses.replace(s, ref_logprobs_T=r) for s, r in zip(g.samples, ref, strict=True))
        )
        for g, ref in zip(groups, ref_logprobs, strict=True)
    ]
    metrics = learner.update(with_reference, WEIGHTS)
    assert metrics["actor/kl"] == pytest.approx(0, abs=1e-6)
    assert metrics["actor/skipped"] == 0
    assert learner.update(with_reference, WEIGHTS)["actor/kl"] > 1e-6
    with pytest.raises(RsgrpoError, match="trainable=False"):
        reference.update(groups, WEIGHTS)


def test_lora_trains_adapters_only_and_its_reference_is_the_base(tiny_model_path, groups):
    learner = make_learner(tiny_model_path, lora=LoraConfig(rank=4))
    base = learner.logprobs(groups)
    before = weights_of(learner)
    learner.update(groups, WEIGHTS)
    after = weights_of(learner)
    assert "model.language_model.layers.0.self_attn.q_proj.weight" in after
    assert not torch.equal(*(w["model.language_model.layers.0.self_attn.q_proj.weight"] for w in (before, after)))
    assert torch.equal(before["lm_head.weight"], after["lm_head.weight"])
    reference, actor = learner.logprobs(groups, reference=True), learner.logprobs(groups)
    assert np.array_equal(reference[0][0], base[0][0])
    assert not np.array_equal(actor[0][0], base[0][0])
    with pytest.raises(RsgrpoError, match=r"model\.lora\.rank > 0"):
        make_learner(tiny_model_path).logprobs(groups, reference=True)


def with_advantages(groups: list[TrainGroup], value: float) -> list[TrainGroup]:
    """Return the groups with one advantage on every token in scope."""

    def changed(sample: Sample) -> Sample:
        return dataclasses.replace(sample, advantages_KT=np.where(sample.scope_KT, value, 0.0))

    return [TrainGroup(group.prompt, tuple(map(changed, group.samples))) for group in groups]


def test_a_batch_without_signal_skips_the_step_and_says_so(tiny_model_path, groups):
    learner = make_learner(tiny_model_path)
    before = weights_of(learner)
    metrics = learner.update(with_advantages(groups, 0.0), WEIGHTS)
    assert metrics["actor/skipped"] == 1
    assert metrics["actor/active_terms"] == 0
    assert all(np.isfinite(value) for value in metrics.values())
    assert learner.weights_version == 0
    assert all(torch.equal(before[name], tensor) for name, tensor in weights_of(learner).items())


def test_non_finite_steps_move_nothing_and_stop_the_run_with_the_batch_saved(tiny_model_path, groups, tmp_path):
    learner = make_learner(tiny_model_path, max_bad_steps=2, debug_dir=tmp_path)
    before = weights_of(learner)
    bad = with_advantages(groups, np.inf)
    metrics = learner.update(bad, WEIGHTS)
    assert metrics["actor/skipped"] == 1
    assert metrics["actor/bad_steps"] == 1
    with pytest.raises(RsgrpoError, match=r"2 consecutive optimiser steps .*max_bad_steps=2.*bad_batch_1\.pt"):
        learner.update(bad, WEIGHTS)
    assert all(torch.equal(before[name], tensor) for name, tensor in weights_of(learner).items())
    saved = torch.load(tmp_path / "bad_batch_1.pt", weights_only=False)
    assert [group.prompt.id for group in saved["groups"]] == [group.prompt.id for group in groups]


def test_a_good_step_ends_a_row_of_bad_ones(tiny_model_path, groups):
    learner = make_learner(tiny_model_path, max_bad_steps=2)
    bad = with_advantages(groups, np.inf)
    for batch in (bad, groups, bad):
        learner.update(batch, WEIGHTS)
    assert learner.weights_version == 1


def test_saved_state_gives_the_very_same_next_update(tiny_model_path, groups, tmp_path):
    options: dict[str, Any] = {"lr_schedule": "cosine", "warmup_steps": 2, "lora": LoraConfig(rank=2, dropout=0.2)}
    learner = make_learner(tiny_model_path, **options)
    learner.update(groups, WEIGHTS)
    learner.save(tmp_path / "state")
    straight = learner.update(groups, WEIGHTS)
    resumed = make_learner(tiny_model_path, **options)
    resumed.load(tmp_path / "state")
    assert resumed.weights_version == 1
    assert learnt(resumed.update(groups, WEIGHTS)) == learnt(straight)
    other = weights_of(resumed)
    assert all(torch.equal(tensor, other[name]) for name, tensor in weights_of(learner).items())
    with pytest.raises(RsgrpoError, match="holds a learner's state already"):
        learner.save(tmp_path / "state")


@pytest.mark.parametrize("lora", [0, 2])
def test_an_export_loads_and_gives_equal_logits(lora, tiny_model_path, groups, tmp_path):
    learner = make_learner(tiny_model_path, lora=LoraConfig(rank=lora))
    learner.update(groups, WEIGHTS)
    learner.export(tmp_path / "export")
    exported = make_learner(str(tmp_path / "export"))
    expected, found = learner.logprobs(groups), exported.logprobs(groups)
    for one, other in zip(expected, found, strict=True):
        for logprobs_T, exported_T in zip(one, other, strict=True):
            np.testing.assert_allclose(logprobs_T, exported_T, atol=1e-5)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "export")
    named = dict(model.named_parameters())
    for name, tensor in learner.gather_weights():
        torch.testing.assert_close(named[name].data, tensor)
    processor = AutoProcessor.from_pretrained(tmp_path / "export")
    trained_with = {"shortest_edge": learner.inputs.min_pixels, "longest_edge": learner.inputs.max_pixels}
    assert {key: processor.image_processor.size[key] for key in trained_with} == trained_with
    for file in ("processor_config.json", "preprocessor_config.json", "generation_config.json", "chat_template.jinja"):
        assert (tmp_path / "export" / file).exists(), file


def test_an_export_in_bfloat16_and_in_shards_holds_the_rounded_weights(tiny_model_path, tmp_path, monkeypatch):
    monkeypatch.setattr("rsgrpo.learning.export._SHARD_BYTES", 100_000)
    learner = make_learner(tiny_model_path)
    learner.export(tmp_path, dtype=torch.bfloat16)
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
    model = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert model.dtype == torch.bfloat16
    for name, tensor in learner.gather_weights():
        assert torch.equal(dict(model.named_parameters())[name].data, tensor.to(torch.bfloat16))


def test_supervised_steps_learn_two_rows_by_heart(tiny_model_path, page_images):
    groups = make_groups(page_images, [1, 2], num_samples=1)
    learner = make_learner(tiny_model_path, lr=1e-2, eps=1e-8, freeze_vision=False, total_steps=60)
    before = learner.supervised_loss(groups)["actor/loss"]
    first = learner.supervised_update(groups)
    assert first["actor/loss"] == pytest.approx(before, rel=1e-5)
    for _ in range(40):
        learner.supervised_update(groups)
    assert before > 5
    assert learner.supervised_loss(groups)["actor/loss"] < 0.05


def test_supervised_loss_is_the_mean_over_tokens_whatever_the_temperature(tiny_model_path, groups):
    warm, plain = make_learner(tiny_model_path, temperature=2.0), make_learner(tiny_model_path)
    tokens = np.concatenate([logprobs_T for group in plain.logprobs(groups) for logprobs_T in group])
    assert warm.supervised_loss(groups)["actor/loss"] == pytest.approx(-tokens.mean(), rel=1e-5)
    assert not np.allclose(warm.logprobs(groups)[0][0], plain.logprobs(groups)[0][0])


def test_schedules_by_hand():
    factors = [lr_factor(s, schedule="linear", warmup_steps=2, total_steps=6) for s in range(7)]
    assert factors == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    cosine = [lr_factor(s, schedule="cosine", warmup_steps=0, total_steps=4) for s in range(5)]
    assert cosine == pytest.approx([1.0, 0.5 + 0.5**0.5 / 2, 0.5, 0.5 - 0.5**0.5 / 2, 0.0])
    assert lr_factor(99, schedule="constant", warmup_steps=3, total_steps=4) == 1.0


def test_the_schedule_moves_with_batches(tiny_model_path, groups):
    learner = make_learner(tiny_model_path, lr_schedule="linear", warmup_steps=1, total_steps=3, lr=1e-2)
    assert [learner.update(groups, WEIGHTS)["actor/lr"] for _ in range(3)] == pytest.approx([1e-2, 1e-2, 5e-3])


def test_bfloat16_steps_stay_near_float32_ones(tiny_model_path, groups):
    exact, rounded = make_learner(tiny_model_path), make_learner(tiny_model_path, precision="bfloat16")
    for one, other in zip(exact.logprobs(groups), rounded.logprobs(groups), strict=True):
        assert np.abs(one[0] - other[0]).mean() < 0.1
    norms = [learner.update(groups, WEIGHTS)["actor/grad_norm"] for learner in (exact, rounded)]
    assert norms[1] == pytest.approx(norms[0], rel=0.05)
    assert all(tensor.dtype == torch.float32 for _, tensor in rounded.gather_weights())


@pytest.mark.parametrize("last", ["logprobs", "supervised_loss", "update without signal"])
def test_weights_after_any_pass_are_the_float32_masters(last, tiny_model_path, groups, tmp_path):
    learner = make_learner(tiny_model_path, precision="bfloat16", algorithm=AlgorithmConfig(on_policy_shortcut=False))
    learner.update(groups, WEIGHTS)
    masters = weights_of(learner)
    if last == "update without signal":  # it has a pass for the old log-probabilities, and no backward
        learner.update(with_advantages(groups, 0.0), WEIGHTS)
    else:
        getattr(learner, last)(groups)
    after = weights_of(learner)
    assert {tensor.dtype for tensor in after.values()} == {torch.float32}
    assert all(torch.equal(masters[name], tensor) for name, tensor in after.items())
    learner.export(tmp_path / "export")
    exported = load_file(tmp_path / "export" / "model.safetensors")
    assert torch.equal(exported["lm_head.weight"], masters["lm_head.weight"])


@pytest.mark.parametrize("call", ["update", "supervised_update", "supervised_loss", "logprobs"])
def test_cached_gpu_memory_is_given_back_before_a_call_returns(call, tiny_model_path, groups, monkeypatch):
    learner = make_learner(tiny_model_path)
    given_back: list[str] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: given_back.append(call))
    monkeypatch.setattr("rsgrpo.learning.learner.give_back", lambda policy, device: give_back(policy, CUDA))
    getattr(learner, call)(groups, *([WEIGHTS] if call == "update" else []))
    assert given_back == [call]


def test_the_self_check_finds_a_forward_that_differs(tiny_model_path, groups, monkeypatch):
    learner = make_learner(tiny_model_path)
    wrong = lambda model, tokens_BT, *_, **__: torch.arange(tokens_BT.shape[1]).expand(3, 1, -1) * 2  # noqa: E731
    monkeypatch.setattr(learner.policy.family, "position_ids", wrong)
    with pytest.raises(RsgrpoError, match=r"shared-prefix logprobs differ from the plain forward's by"):
        learner.update(groups, WEIGHTS)
    unchecked = make_learner(tiny_model_path, self_check=False)
    monkeypatch.setattr(unchecked.policy.family, "position_ids", wrong)
    assert unchecked.update(groups, WEIGHTS)["actor/skipped"] == 0


@pytest.mark.parametrize(
    ("change", "banned", "message"),
    [
        ({"token_ids_T": np.array([], dtype=np.int64)}, [], "has no tokens"),
        ({"scope_KT": np.ones((2, 1), dtype=bool)}, [], r"must both be \(terms, tokens\)"),
        ({}, range(300), r"contains vision token\(s\) \["),
        (None, [], "has no samples"),
    ],
)
def test_groups_that_cannot_be_trained_on_are_refused(change, banned, message, groups):
    samples = () if change is None else (dataclasses.replace(groups[0].samples[0], **change),)
    with pytest.raises(RsgrpoError, match=message):
        check_groups([TrainGroup(groups[0].prompt, samples)], banned)


def test_a_step_needs_a_group_and_a_loss_weight_for_every_term(tiny_model_path, groups):
    with pytest.raises(RsgrpoError, match="at least one"):
        check_groups([], [])
    with pytest.raises(RsgrpoError, match="1 loss weights for 2 loss terms"):
        make_learner(tiny_model_path).update(groups, [1.0])


def test_metrics_of_several_updates_merge():
    merged = merge_updates([{"a": 1.0, "b_max": 1.0, "actor/skipped": 1.0}, {"a": 3.0, "b_max": 0.0}])
    assert merged == {"a": 2.0, "b_max": 1.0, "actor/skipped": 1.0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora": LoraConfig(rank=2), "freeze_vision": False}, r"Set model\.freeze_vision=true"),
        ({"feature_cache": "features", "freeze_vision": False}, r"feature_cache=.* keeps features of a frozen tower"),
        ({"offload": True}, r"learner\.offload=true"),  # without an accelerator
    ],
)
def test_settings_that_exclude_each_other_are_refused(tiny_model_path, options, message):
    with pytest.raises(RsgrpoError, match=message):
        make_learner(tiny_model_path, **options)


def test_an_unreadable_prompt_is_named(tiny_model_path, groups, tmp_path):
    path = Path(tmp_path / "broken.png")
    path.write_bytes(b"no image")
    prompt = dataclasses.replace(groups[0].prompt, images=(str(path), str(path)))
    sample = Sample(np.array([5]), np.ones((1, 1), dtype=bool), np.ones((1, 1), dtype=np.float32))
    with pytest.raises(RsgrpoError, match=r"prompt p0: .*broken\.png"):
        make_learner(tiny_model_path).supervised_update([TrainGroup(prompt, (sample,))])
