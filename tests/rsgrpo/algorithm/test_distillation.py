"""On-policy distillation: the term by hand, what it estimates, and that a student teaches itself nothing."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from rsgrpo.algorithm.loss import kl_estimate
from rsgrpo.config.checks import validate
from rsgrpo.config.train import AlgorithmConfig, ClusterConfig, FilterConfig, LoraConfig, ModelConfig, TrainConfig
from rsgrpo.errors import ConfigError, InputError, RsgrpoError
from rsgrpo.learning.policy import frozen_model
from rsgrpo.train import train, with_ref_logprobs
from tests.material.learner import make_groups, make_learner
from tests.material.tiny_families import save_family
from tests.material.training import steps_of, tiny_run, write_rows
from tests.rollout.parity import reference_model
from tests.rsgrpo.algorithm.test_loss import losses

ALONE = AlgorithmConfig(distill_coef=1.0, reward_coef=0.0)


@pytest.fixture(scope="module")
def teacher_path(tiny_model_path, tmp_path_factory) -> str:
    """The tests' own model with other weights."""
    folder = tmp_path_factory.mktemp("teacher")
    make_learner(tiny_model_path).export(folder)
    reference_model(tiny_model_path, seed=1, scale=0.05).save_pretrained(folder)
    return str(folder)


def test_the_term_and_its_gradient_by_hand():
    new = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
    term_N = kl_estimate(new, torch.tensor([-1.0, -1.5, -2.0]), "k2")
    assert term_N.tolist() == pytest.approx([0.0, 0.125, 1.125])
    term_N.sum().backward()
    # A token that the teacher finds likelier is pushed up (-0.5), one that it finds less likely down (1.5).
    assert new.grad is not None
    assert new.grad.tolist() == pytest.approx([0.0, -0.5, 1.5])


def test_its_expected_gradient_is_that_of_the_reverse_kl():
    """All tokens of a vocabulary of five, weighted by how often the student samples them; exact, in float64."""
    logits = torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    teacher = torch.log_softmax(torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)), 0)
    student = torch.log_softmax(logits, 0)
    (exact,) = torch.autograd.grad((student.exp() * (student - teacher)).sum(), logits, retain_graph=True)
    (found,) = torch.autograd.grad((student.exp().detach() * kl_estimate(student, teacher, "k2")).sum(), logits)
    torch.testing.assert_close(found, exact, atol=1e-12, rtol=0)


def test_it_stands_beside_the_rewards_or_in_their_place():
    logprobs = torch.full((4,), -1.0, dtype=torch.float64)
    teacher = {"ref_logprobs_N": torch.tensor([-1.0, -2.0, -1.0, -4.0], dtype=torch.float64)}
    rewards = losses(logprobs).loss.item()
    beside = losses(logprobs, teacher, distill_coef=0.5)
    # d = 0, 1, 0, 3: the mean of d^2 / 2 is 5 / 4, of d (the reverse KL as sampled) 1.
    assert beside.loss.item() == pytest.approx(rewards + 0.5 * 5 / 4)
    assert beside.metrics["actor/teacher_kl"].item() == pytest.approx(1.0)
    alone = losses(logprobs, teacher, distill_coef=0.5, reward_coef=0.0)
    assert alone.loss.item() == pytest.approx(0.5 * 5 / 4)
    with pytest.raises(RsgrpoError, match="distill_coef > 0 needs the teacher's logprobs"):
        losses(logprobs, distill_coef=0.5)


def test_a_teacher_that_is_the_student_teaches_nothing(tiny_model_path, page_images):
    """Law: loss and gradient are zero for every response, not only in expectation."""
    learner = make_learner(tiny_model_path, algorithm=ALONE)
    teacher = make_learner(tiny_model_path, algorithm=ALONE, trainable=False, same_tokens_as=tiny_model_path)
    groups = make_groups(page_images, [1, 0, 2])
    metrics = learner.update(with_ref_logprobs(groups, teacher.logprobs(groups)), [1.0, 1.0])
    assert metrics["actor/loss"] == pytest.approx(0.0, abs=1e-10)
    assert metrics["actor/teacher_kl"] == pytest.approx(0.0, abs=1e-6)
    assert metrics["actor/grad_norm"] == pytest.approx(0.0, abs=1e-5)


def test_groups_without_a_signal_of_any_reward_learn_from_the_teacher(tiny_model_path, teacher_path, page_images):
    """The student comes nearer to another teacher, on responses of which every advantage is zero."""
    learner = make_learner(tiny_model_path, algorithm=ALONE, lr=1e-3, eps=1e-8)
    teacher = make_learner(teacher_path, algorithm=ALONE, trainable=False)
    plain = make_groups(page_images, [1, 0])
    groups = [
        dataclasses.replace(
            group,
            samples=tuple(dataclasses.replace(s, advantages_KT=0 * s.advantages_KT) for s in group.samples),
        )
        for group in plain
    ]
    groups = with_ref_logprobs(groups, teacher.logprobs(groups))
    found = [learner.update(groups, [1.0, 1.0]) for _ in range(8)]
    assert all(metrics["actor/active_terms"] == 0 for metrics in found)
    assert found[0]["actor/loss"] > 1e-3
    assert found[-1]["actor/loss"] < 0.5 * found[0]["actor/loss"]


def test_a_teacher_of_other_tokens_is_refused(tiny_model_path, tmp_path):
    other = save_family("glm4v", tiny_model_path, tmp_path / "more")  # the same tokens and some of its own
    make_learner(other, trainable=False, same_tokens_as=tiny_model_path)
    with pytest.raises(InputError, match=r"cannot judge the responses .* token by token: 11 tokens differ, such as "):
        make_learner(tiny_model_path, trainable=False, same_tokens_as=other)


def test_a_run_takes_the_teacher_for_its_reference(tiny_model_path, teacher_path, page_images, tmp_path):
    config = distilling(tiny_model_path, teacher_path, page_images, tmp_path)
    train(config)
    first, _ = steps_of(config)
    assert first["actor/teacher_kl"] > 0.01
    assert first["actor/skipped"] == 0
    assert "actor/kl" not in first


def distilling(path: str, teacher: str, page_images, folder, **algorithm) -> TrainConfig:
    """A tiny run that learns from a teacher alone, in one process."""
    return tiny_run(
        folder / "runs",
        write_rows(folder / "rows.jsonl", page_images),
        path,
        rewards={"overlong": "rewards.evisrag:overlong"},
        model=ModelConfig(path=path, teacher=teacher),
        algorithm=AlgorithmConfig(prompts_per_step=2, **{"distill_coef": 1.0, "reward_coef": 0.0, **algorithm}),
        cluster=ClusterConfig(kind="inline"),
    )


def test_the_frozen_model_is_the_teacher_without_adapters(tiny_model_path, page_images, tmp_path):
    config = distilling(tiny_model_path, "some/teacher", page_images, tmp_path)
    model = dataclasses.replace(config.model, revision="abc", lora=LoraConfig(rank=4))
    config = dataclasses.replace(config, model=model)
    assert config.needs_reference_workers
    frozen = frozen_model(model)
    assert (frozen.path, frozen.revision, frozen.lora.rank) == ("some/teacher", "", 0)
    assert frozen_model(ModelConfig(path="m")) == ModelConfig(path="m")


def test_what_a_teacher_contradicts_is_refused(tiny_model_path, page_images, tmp_path):
    with pytest.raises(ConfigError, match=r"kl_coef=0\.1 and algorithm\.distill_coef=1 need one frozen model each"):
        AlgorithmConfig(kl_coef=0.1, distill_coef=1.0)
    with pytest.raises(ConfigError, match="learns from a teacher alone, from every group"):
        AlgorithmConfig(reward_coef=0.0)
    with pytest.raises(ConfigError, match="learns from a teacher alone, from every group"):
        AlgorithmConfig(reward_coef=0.0, distill_coef=1.0, filter=FilterConfig(enabled=True))
    with pytest.raises(ConfigError, match="need each other"):
        validate(distilling(tiny_model_path, "", page_images, tmp_path))
    with pytest.raises(ConfigError, match="need each other"):
        validate(distilling(tiny_model_path, "t", page_images, tmp_path, distill_coef=0.0, reward_coef=1.0))
