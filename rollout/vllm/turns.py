"""Conversations in vLLM: every rollout at its own pace, one request a turn; what came before is in the prefix cache."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from rollout.engine import EngineError
from rollout.inputs.images import PromptError
from rollout.inputs.processor import InputProcessor, PromptInputs, pixel_hash
from rollout.turns.episode import Episode
from rollout.types import Prompt, Rollout, RolloutGroup, SamplingParams
from rollout.vllm.requests import oldest_version, sampling_params, split_experts

Ask = Callable[[dict[str, Any], Any], Awaitable[Any]]
"""(request, vLLM's sampling parameters) -> its finished output."""


@dataclass(frozen=True, slots=True)
class Conversations:
    """What the conversations about one prompt share.

    pool: where environments wait and images are prepared, apart from the event loop.
    streams: outputs come while tokens are still sampled.
    """

    prompt: Prompt
    sampling: SamplingParams
    processor: InputProcessor
    pool: Executor
    ask: Ask
    streams: bool = False

    async def group(self, episodes: Sequence[Episode], request: dict[str, Any], num_tokens: int) -> RolloutGroup:
        """Sample one rollout per episode.

        request, num_tokens: as `build_request` returns them.

        Raises:
            EngineError: vLLM expands a conversation to another number of tokens than we do.
            PromptError: vLLM ended a turn by something else than a limit or a stop.
        """
        try:
            async with asyncio.TaskGroup() as tasks:
                running = [
                    tasks.create_task(self._rollout(episode, index, request, num_tokens))
                    for index, episode in enumerate(episodes)
                ]
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        rollouts, experts = zip(*(task.result() for task in running), strict=True)
        return RolloutGroup(self.prompt, rollouts, num_tokens, prompt_experts_TLk=experts[0])

    async def _rollout(
        self, episode: Episode, index: int, request: dict[str, Any], num_tokens: int
    ) -> tuple[Rollout, np.ndarray | None]:
        """Sample turn by turn; return the rollout and the experts of its prompt.

        Tokens go back as they were sampled; nothing is tokenised again. The last turn's experts are those of all turns.
        """
        in_thread = asyncio.get_running_loop().run_in_executor
        num_prompt_tokens = num_tokens
        versions: list[int] = []
        while True:
            left, turn = self.sampling.max_tokens - episode.num_tokens, len(versions) + 1
            sampling = replace(self.sampling, max_tokens=min(left, episode.max_turn_tokens or left))
            params = turn_params(self.processor, self.prompt, sampling, index, turn, episode.stop, streams=self.streams)
            output = await self.ask(request, params)
            if (seen := len(output.prompt_token_ids)) != num_tokens:
                raise EngineError(
                    f"vLLM reads turn {turn} of prompt {self.prompt.id} as {seen} tokens, the learner as {num_tokens}: "
                    "their image processors differ. Check the model folder's processor configuration."
                )
            (completion,) = output.outputs
            if completion.finish_reason not in ("stop", "length"):
                raise PromptError(f"vLLM ended turn {turn} by {completion.finish_reason}")
            token_ids, logprobs = list(completion.token_ids), list(completion.logprobs.logprobs)
            versions.append(oldest_version(completion))
            answer = await in_thread(self.pool, _answer, episode, token_ids, logprobs, len(token_ids) >= left)
            if answer is None:
                num_tokens += len(token_ids)
                prompt_experts_TLk, experts_RLk = split_experts(completion, num_prompt_tokens, num_tokens)
                rollout = replace(episode.rollout(min(versions)), experts_RLk=experts_RLk)
                return rollout, prompt_experts_TLk
            num_tokens += len(token_ids) + len(answer.token_ids_T)
            images = episode.last_images
            request = await in_thread(self.pool, continued, self.processor, request, token_ids, answer, images)


def _answer(episode: Episode, token_ids: list[int], logprobs: list[float], is_cut: bool) -> PromptInputs | None:
    return episode.answer(token_ids, logprobs, is_cut=is_cut)


def turn_params(
    processor: InputProcessor,
    prompt: Prompt,
    sampling: SamplingParams,
    index: int,
    turn: int,
    stop: Sequence[str],
    *,
    streams: bool,
) -> Any:
    """Return vLLM's sampling parameters for one turn of one rollout."""
    params = sampling_params(processor, prompt, replace(sampling, group_size=1), streams=streams)
    digest = hashlib.sha256(f"{sampling.seed}\0{index}\0{turn}\0{prompt.id}".encode()).digest()
    params.seed = int.from_bytes(digest[:6], "big")
    if stop:
        params.stop, params.include_stop_str_in_output, params.detokenize = list(stop), True, True
    return params


def continued(
    processor: InputProcessor,
    request: dict[str, Any],
    token_ids: Sequence[int],
    answer: PromptInputs,
    sources: Sequence[Any],
) -> dict[str, Any]:
    """Return the request of the next turn: all so far, the turn, and what the environment answered to it."""
    ids = [*request["prompt_token_ids"], *token_ids, *processor.collapsed(answer)]
    following: dict[str, Any] = {**request, "prompt_token_ids": ids}
    if sources:
        images = processor.resized_images(sources)
        for key, added in (("multi_modal_data", images), ("multi_modal_uuids", map(pixel_hash, images))):
            before = request.get(key, {})
            following[key] = {**before, "image": [*before.get("image", ()), *added]}
    return following
