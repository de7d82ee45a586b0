"""What transformers says about a prompt and a response: the reference of the vLLM tests."""

from __future__ import annotations

import torch
from transformers import AutoModelForImageTextToText

from rollout.config import InputsConfig, RolloutConfig, VllmConfig
from rollout.inputs.processor import InputProcessor
from rollout.types import Prompt

INPUTS = InputsConfig(min_pixels=784, max_pixels=784 * 16, max_images=3, max_prompt_tokens=400)
ROLLOUT = RolloutConfig(
    engine="vllm",
    max_response_tokens=48,
    vllm=VllmConfig(kv_cache_gib=0.0625, max_num_seqs=16, mm_cache_gib=0.25, stall_timeout_s=15, sync_timeout_s=120),
)


def reference_model(path, seed=None, scale=0.02):
    """The folder's model in float32; with a seed, every parameter moved by noise."""
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval().requires_grad_(False)
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


def forward(model, processor: InputProcessor, prompt: Prompt, response):
    """Logits of every position, vision tokens banned: (T, V), the last ones predict what would follow."""
    encoded = processor.encode(prompt)
    ids = torch.tensor([[*encoded.token_ids_T, *response]])
    inputs = {"input_ids": ids, "mm_token_type_ids": (ids == processor.image_token_id).long()}
    if encoded.pixel_values is not None and encoded.image_grid_thw is not None:
        inputs |= {"pixel_values": encoded.pixel_values, "image_grid_thw": encoded.image_grid_thw}
    logits = model(**inputs, use_cache=False).logits[0]
    logits[:, processor.banned_token_ids] = float("-inf")
    return logits[len(encoded.token_ids_T) - 1 :]


def reference_logprobs(model, processor, prompt, response, temperature=1.0):
    """log_softmax((logits + ban) / T) of each token of a response."""
    logprobs = torch.log_softmax(forward(model, processor, prompt, response)[:-1] / temperature, dim=-1)
    return logprobs.gather(1, torch.tensor(response)[:, None])[:, 0]


def reference_greedy(model, processor, prompt, max_tokens):
    """The greedy response, token by token."""
    response: list[int] = []
    while len(response) < max_tokens:
        response.append(int(forward(model, processor, prompt, response)[-1].argmax()))
        if response[-1] == processor.eos_token_id:
            break
    return response


def assert_greedy_parity(engine, model, prompts, sampling):
    """Tokens equal, logprobs to 1e-4."""
    groups = {group.prompt.id: group for group in engine.generate(prompts, sampling)}
    for prompt in prompts:
        assert groups[prompt.id].error is None
        rollout = groups[prompt.id].rollouts[0]
        assert list(rollout.token_ids_T) == reference_greedy(model, engine.processor, prompt, sampling.max_tokens)
        expected = reference_logprobs(model, engine.processor, prompt, rollout.token_ids_T)
        torch.testing.assert_close(torch.tensor(rollout.logprobs_T), expected, atol=1e-4, rtol=0)
