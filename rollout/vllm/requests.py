"""Conversion between our types and vLLM's: a prompt becomes a request, its output a group."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import numpy as np

from rollout.engine import EngineError
from rollout.inputs.images import PromptError
from rollout.inputs.processor import InputProcessor
from rollout.types import Prompt, RolloutGroup, SamplingParams
from rollout.vllm.vision import media

PIXELS_HELD_BYTES = 8 << 30
"""Images of prompts that wait or are sampled, as pixels, in an engine's process at once."""
_BYTES_PER_PIXEL = 9  # 3 as an image, and 3 as bytes and 3 as patches on their way


def prompts_at_once(max_num_seqs: int, group_size: int, prompt_pixels: int) -> int:
    """Return how many prompts an engine works on: twice as many as fit, so that it is always full.

    Fewer where their images would take too much memory: a validation of single responses admits hundreds of prompts.

    prompt_pixels: of all images of the largest prompt.
    """
    held = PIXELS_HELD_BYTES // max(1, _BYTES_PER_PIXEL * prompt_pixels)
    return max(2, min(2 * max_num_seqs // group_size, held))


def is_broken_off(output: Any) -> bool:
    """Return whether vLLM ended some response by an error of its own, not at a limit and not at a stop."""
    return any(completion.finish_reason not in ("stop", "length") for completion in output.outputs)


def build_request(
    processor: InputProcessor, prompt: Prompt, max_tokens: int, max_model_len: int
) -> tuple[dict[str, Any], int]:
    """Return vLLM's form of a prompt, one placeholder per image or video, and its length with all vision tokens.

    max_tokens: that may follow, of the policy and of an environment.

    Raises:
        PromptError: the prompt cannot be sampled.
    """
    num_tokens = processor.count_tokens(prompt)
    processor.check_length(num_tokens)
    if num_tokens + max_tokens > max_model_len:
        raise PromptError(
            f"{num_tokens:,} prompt tokens and {max_tokens:,} for the response exceed the engine's {max_model_len:,}. "
            "Raise rollout.vllm.engine_args.max_model_len or lower rollout.max_response_tokens."
        )
    request: dict[str, Any] = {"prompt_token_ids": processor.placeholder_ids(prompt)}
    if prompt.images:
        request |= media(prompt, processor.load_images(prompt))
    return request, num_tokens


def sampling_params(
    processor: InputProcessor, prompt: Prompt, sampling: SamplingParams, *, streams: bool = False
) -> Any:
    """Return vLLM's sampling parameters for a prompt's group. streams: outputs come while tokens are still sampled."""
    from vllm import SamplingParams as VllmSampling
    from vllm.sampling_params import RequestOutputKind

    digest = hashlib.sha256(f"{sampling.seed}\0{prompt.id}".encode()).digest()
    return VllmSampling(
        n=sampling.group_size if sampling.temperature else 1,  # vLLM refuses several greedy responses
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        max_tokens=sampling.max_tokens,
        # vLLM adds the rollout's index; 48 bits keep the ranges of prompts apart and inside int64.
        seed=int.from_bytes(digest[:6], "big"),
        stop_token_ids=[processor.eos_token_id],
        ignore_eos=True,  # only our end-of-text ends a response, whatever else the model folder lists
        logit_bias=dict.fromkeys(processor.banned_token_ids, float("-inf")),
        logprobs=0,
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.CUMULATIVE if streams else RequestOutputKind.FINAL_ONLY,
    )


def to_group(
    processor: InputProcessor, prompt: Prompt, sampling: SamplingParams, num_tokens: int, output: Any
) -> RolloutGroup:
    """Return a finished request as a group.

    Raises:
        EngineError: vLLM expanded the prompt to another number of tokens than we do.
    """
    seen = len(output.prompt_token_ids)
    if seen != num_tokens:
        raise EngineError(
            f"vLLM reads prompt {prompt.id} as {seen} tokens, the learner as {num_tokens}: their image processors "
            "differ. Check the model folder's processor configuration."
        )
    rollouts = []
    for completion in output.outputs:
        if completion.finish_reason not in ("stop", "length"):
            return RolloutGroup(prompt, (), num_tokens, error=f"vLLM ended a rollout by {completion.finish_reason}")
        token_ids_T, logprobs_T = tuple(completion.token_ids), tuple(completion.logprobs.logprobs)
        rollout = processor.rollout(token_ids_T, logprobs_T, oldest_version(completion))
        _, experts_RLk = split_experts(completion, num_tokens, num_tokens + len(token_ids_T))
        rollouts.append(replace(rollout, experts_RLk=experts_RLk, version_ends=version_ends(completion)))
    prompt_experts_TLk, _ = split_experts(completion, num_tokens, num_tokens + len(token_ids_T))
    if not sampling.temperature:
        rollouts *= sampling.group_size
    return RolloutGroup(prompt, tuple(rollouts), num_tokens, prompt_experts_TLk=prompt_experts_TLk)


def split_experts(
    completion: Any, num_prompt_tokens: int, num_tokens: int
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Return the experts of the prompt's tokens and of what follows, as our types have them; None: not recorded.

    num_tokens: of prompt and response with what it read. The last one was never computed with.

    Raises:
        EngineError: vLLM recorded another number of tokens.
    """
    experts = completion.routed_experts
    if experts is None:
        return None, None
    if len(experts) != num_tokens - 1:
        raise EngineError(
            f"vLLM returned the experts of {len(experts)} tokens, not of {num_tokens - 1}. Set "
            "rollout.routing_replay=false."
        )
    # Copies: siblings do not keep each other's prompt in memory.
    return experts[:num_prompt_tokens].copy(), experts[num_prompt_tokens:].copy()


def version_ends(completion: Any) -> tuple[tuple[int, int], ...]:
    """Return `Rollout.version_ends` of a completion."""
    spans = [(int(span.version), int(span.end)) for span in completion.weight_versions]
    return tuple(spans) if len(spans) > 1 else ()


def oldest_version(completion: Any) -> int:
    """Return the version of the weights under which a response began: one that was preempted may have seen several."""
    return min(int(span.version) for span in completion.weight_versions)
