"""What transformers says about a prompt and a response: the reference of the engines' tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoModelForImageTextToText

from rollout.config import InputsConfig, RolloutConfig, VllmConfig
from rollout.families import family_of
from rollout.inputs.processor import InputProcessor
from rollout.types import Observation, Prompt, SamplingParams
from tests.material.environments import conversation

INPUTS = InputsConfig(
    min_pixels=784, max_pixels=784 * 16, max_images=3, max_videos=2, max_frames=12, max_prompt_tokens=400
)
ROLLOUT = RolloutConfig(
    engine="vllm",
    max_response_tokens=48,
    vllm=VllmConfig(
        kv_cache_gib=0.0625,
        engine_args={"max_num_seqs": 16, "mm_processor_cache_gb": 0.25},
        stall_timeout_s=15,
        sync_timeout_s=120,
    ),
)


def reference_model(path, seed=None, scale=0.02):
    """The folder's model in float32; with a seed, every parameter moved by noise."""
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval().requires_grad_(False)
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


def reference_logits(model, processor: InputProcessor, prompt: Prompt, response) -> torch.Tensor:
    """(T, V) logits of each response token by one forward of the whole sequence, vision tokens banned."""
    encoded = processor.encode(prompt)
    ids = torch.tensor([[*encoded.token_ids_T, *response]])
    vision = encoded.pixel_values, encoded.image_grid_thw, encoded.video_steps
    inputs = processor.family.whole_inputs(model, ids, *vision)
    model.model.rope_deltas = None  # of the prompt before
    with torch.no_grad():
        logits = model(**inputs, use_cache=False).logits[0]
    logits[:, processor.banned_token_ids] = float("-inf")
    return logits[len(encoded.token_ids_T) - 1 : -1]


def reference_logprobs(model, processor, prompt, response, temperature=1.0):
    """log_softmax((logits + ban) / T) of each token of a response."""
    logprobs = torch.log_softmax(reference_logits(model, processor, prompt, response) / temperature, dim=-1)
    return logprobs.gather(1, torch.tensor(response)[:, None])[:, 0]


def assert_sampled_from(model, engine, group, temperature=1.0, tolerance=1e-4):
    """The group's log-probabilities are those of transformers, given its tokens."""
    assert group.error is None
    for rollout in group.rollouts:
        expected = reference_logprobs(model, engine.processor, group.prompt, rollout.token_ids_T, temperature)
        torch.testing.assert_close(torch.tensor(rollout.logprobs_T), expected, atol=tolerance, rtol=0)


def assert_greedy(model, engine, group):
    """The group's one response is the greedy one of transformers, log-probabilities to 1e-4."""
    assert_sampled_from(model, engine, group)
    (rollout,) = group.rollouts
    best = reference_logits(model, engine.processor, group.prompt, rollout.token_ids_T).argmax(-1)
    assert list(rollout.token_ids_T) == best.tolist()


def assert_greedy_parity(engine, model, prompts, sampling):
    """Every prompt's greedy response is transformers' own, with end-of-text nowhere but at its end."""
    groups = list(engine.generate(prompts, sampling))
    assert {group.prompt.id for group in groups} == {prompt.id for prompt in prompts}
    for group in groups:
        assert_greedy(model, engine, group)
        token_ids = list(group.rollouts[0].token_ids_T)
        assert engine.processor.eos_token_id not in token_ids[:-1]
        assert len(token_ids) == sampling.max_tokens or token_ids[-1] == engine.processor.eos_token_id


def assert_conversations(model, engine, group, temperature):
    """Log-probabilities of every sampled token are transformers' own, given all before it, images included."""
    processor = engine.processor
    for rollout in group.rollouts:
        ids, sampled, pixels, grids = conversation(processor, group.prompt, rollout)
        row = torch.tensor([ids])
        inputs = {"input_ids": row, "mm_token_type_ids": (row == processor.image_token_id).long()}
        if pixels:
            inputs |= {"pixel_values": torch.cat(pixels), "image_grid_thw": torch.cat(grids)}
        model.model.rope_deltas = None
        with torch.no_grad():
            logits = model(**inputs, use_cache=False).logits[0]
        logits[:, processor.banned_token_ids] = float("-inf")
        logprobs = torch.log_softmax(logits[:-1] / temperature, -1).gather(1, row[0, 1:, None])[:, 0]
        expected = logprobs[torch.tensor(sampled[1:])]
        torch.testing.assert_close(torch.tensor(rollout.logprobs_T), expected, atol=1e-4, rtol=0)
        assert not set(rollout.token_ids_T) & set(processor.banned_token_ids)


def assert_heard(engine, prompt):
    """A conversation of several turns is streamed as it is: text in pieces, observations in their places."""
    for seed in range(9):
        *heard, group = engine.stream(prompt, SamplingParams(max_tokens=40, seed=seed))
        rollout = group.rollouts[0]
        assert "".join(piece for piece in heard if isinstance(piece, str)) == rollout.text
        assert [piece for piece in heard if isinstance(piece, Observation)] == list(rollout.observations)
        if len(rollout.observations) > 1:
            return
    raise AssertionError("no conversation of several turns")


def experts_taken(model: Any, inputs: dict[str, Any]) -> np.ndarray:
    """Return (T, layers, k), the experts of each token of one row."""
    taken: list[torch.Tensor] = []
    routers = family_of(model.config.model_type).routers(model).values()
    hooks = [router.register_forward_hook(lambda *call: taken.append(call[2][2])) for router in routers]
    model.model.rope_deltas = None  # of the row before
    with torch.no_grad():
        model(**inputs, use_cache=False)
    for hook in hooks:
        hook.remove()
    return torch.stack(taken, 1).numpy()


@contextmanager
def forced_experts(model: Any, experts_TLk: np.ndarray) -> Iterator[None]:
    """Let a row's tokens take these experts; tokens after the last of them take what they would."""
    routers = family_of(model.config.model_type).routers(model)

    def forward_of(router: Any, forced: torch.Tensor) -> Any:
        def forward(hidden_states: torch.Tensor) -> Any:
            logits = F.linear(hidden_states.reshape(-1, router.hidden_dim).float(), router.weight.float())
            experts = logits.topk(router.top_k).indices
            experts[: len(forced)] = forced
            # The softmax over the chosen experts' logits is that over all of them, renormalised.
            return logits, logits.gather(1, experts).softmax(-1).to(hidden_states.dtype), experts

        return forward

    own = {layer: router.forward for layer, router in routers.items()}
    for layer, router in routers.items():
        router.forward = forward_of(router, torch.from_numpy(experts_TLk[:, layer].astype(np.int64)))
    try:
        yield
    finally:
        for layer, router in routers.items():
            router.forward = own[layer]
