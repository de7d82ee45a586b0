"""Every silent fault of engines that the field knows is caught by the engine check, with the real embedded engine."""

from __future__ import annotations

import dataclasses

import pytest

from rollout.config import InputsConfig, RolloutConfig
from rollout.types import Prompt
from rsgrpo.cluster.sabotage import _truncated, try_all
from rsgrpo.config.train import LearnerConfig, LoraConfig, ModelConfig, TrainConfig
from rsgrpo.errors import InputError


def config_of(model_path: str, lora_rank: int = 0) -> TrainConfig:
    return TrainConfig(
        model=ModelConfig(path=model_path, lora=LoraConfig(rank=lora_rank)),
        inputs=InputsConfig(min_pixels=784, max_pixels=784 * 16, max_images=3, max_prompt_tokens=400),
        rollout=RolloutConfig(engine="hf", max_response_tokens=12, num_threads=1, max_batch_sequences=8),
        learner=LearnerConfig(
            device="cpu", precision="float32", num_threads=1, gradient_checkpointing="none", lr=1e-3,
            max_tokens_per_micro_batch=1024,
        ),
    )  # fmt: skip


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_every_sabotage_is_caught(attentive_model_path, page_images, lora_rank):
    prompts = [
        Prompt("three", "<image> and <image> or <image> what amount is on page 2?", tuple(page_images[:3])),
        Prompt("two", "<image><image> what code is on page 1?", tuple(page_images[1:3])),
    ]
    found = {
        outcome.name: set(outcome.caught_by) for outcome in try_all(config_of(attentive_model_path, lora_rank), prompts)
    }
    assert len(found) == 7
    assert [name for name, caught_by in found.items() if not caught_by] == []
    assert "blank pages change its answer by" in found["images dropped (grey pages in their place)"]
    for name in ("second image unseen", "images in another order"):  # all counts agree
        assert found[name] <= {"greedy token below the best", "log-probabilities differ by"}
    assert "contains vision token(s)" in next(iter(found["sampled image token"]))
    assert "prompt tokens, image tokens" in found["truncated prompt"] & found["other resize"]


def test_rows_without_two_images_are_refused(attentive_model_path, page_images):
    rows = [Prompt("one", "<image> what code?", (page_images[0],))]
    with pytest.raises(InputError, match="needs a training row with two images"):
        try_all(config_of(attentive_model_path), rows)


def test_a_truncated_prompt_keeps_its_images():
    prompt = Prompt("p", "look at <image> and <image>, what is it? <image>")
    cut = _truncated(prompt).text
    assert cut.count("<image>") == 3
    assert cut.startswith("look at <image> and <image>, what")
    assert len(cut) < len(prompt.text)
    assert dataclasses.replace(prompt, text=cut) == _truncated(prompt)
