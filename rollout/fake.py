"""The scripted engine: answers from a file, or the gold response. For tests and for dry runs of a training set-up.

It tokenises with the model folder's tokenizer and refuses the prompts that a real engine refuses; it loads no weights.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import torch

from rollout.config import InputsConfig, RolloutConfig
from rollout.engine import Backend, EngineError, check_sampling
from rollout.errors import InputError
from rollout.files import read_jsonl
from rollout.inputs.images import PromptError
from rollout.inputs.processor import InputProcessor
from rollout.types import FinishReason, Prompt, Rollout, RolloutGroup, SamplingParams


@dataclass(frozen=True, slots=True)
class ScriptEntry:
    """What the script says about one prompt.

    responses: taken in turn by the rollouts of its group. error: what the prompt fails with, or None.
    """

    responses: tuple[str, ...]
    error: str | None


class FakeEngine:
    """Answers prompts from a script; a prompt that is not in it gets its gold response."""

    backend: Backend = "load"

    def __init__(
        self,
        model_path: str,
        rollout: RolloutConfig,
        inputs: InputsConfig,
        *,
        revision: str = "",
        trust_remote_code: bool = False,
    ) -> None:
        """Load the tokenizer, the script and the function that `rollout.gold_response` names.

        Raises:
            EngineError: the script or the function cannot be loaded.
        """
        self.processor = InputProcessor(model_path, inputs, revision=revision, trust_remote_code=trust_remote_code)
        self.weights_version = 0
        self._script = read_script(rollout.script) if rollout.script else {}
        self._compose = _load_function(rollout.gold_response) if rollout.gold_response else None

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> Iterator[RolloutGroup]:
        """Yield one group per prompt, in order; log-probabilities are 0."""
        check_sampling(sampling)
        for prompt in prompts:
            try:
                num_prompt_tokens = len(self.processor.encode(prompt).token_ids_T)
                responses = self._responses(prompt)
                token_ids = [self.processor.encode_response(response) for response in responses]
            except PromptError as error:
                yield RolloutGroup(prompt, (), error=str(error))
                continue
            rollouts = tuple(self._rollout(ids, sampling.max_tokens) for ids in token_ids)
            yield RolloutGroup(prompt, tuple(islice(cycle(rollouts), sampling.group_size)), num_prompt_tokens)

    def load_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Take the tensors and drop them."""
        for _ in named_tensors:
            pass

    def finish_weights(self, version: int) -> None:
        """Count the version."""
        self.weights_version = version

    def count_vision(self, prompts: Sequence[Prompt]) -> list[tuple[int, int, int]]:
        """Return (tokens, image tokens, image features) of each prompt."""
        return [self.processor.count_vision(prompt) for prompt in prompts]

    def stats(self) -> dict[str, float]:
        """Nothing is counted here."""
        return {}

    def close(self) -> None:
        """Nothing to free."""

    def _responses(self, prompt: Prompt) -> Sequence[str]:
        entry = self._script.get(prompt.id)
        if entry is None:
            return (self._gold_text(prompt),)
        if entry.error is not None:
            raise PromptError(entry.error)
        return entry.responses

    def _gold_text(self, prompt: Prompt) -> str:
        """Return the row's own gold response (`truth["gold"]`), what `rollout.gold_response` makes, or the answer."""
        truth = prompt.truth
        if truth.get("gold"):
            return str(truth["gold"])
        if not truth.get("answers"):
            raise PromptError(f"prompt {prompt.id!r} is not in rollout.script and its row has no gold answer")
        if self._compose is None:
            return str(truth["answers"][0])
        try:
            return self._compose(truth)
        except ValueError as error:  # RewardError is one
            raise PromptError(f"prompt {prompt.id!r}: {error}") from error

    def _rollout(self, token_ids_T: list[int], max_tokens: int) -> Rollout:
        finish: FinishReason = "stop" if len(token_ids_T) <= max_tokens else "length"
        kept_T = token_ids_T[:max_tokens]
        text, spans_T = self.processor.decode(kept_T)
        return Rollout(kept_T, [0.0] * len(kept_T), text, spans_T, finish, self.weights_version)


def _load_function(target: str) -> Callable[[Mapping[str, Any]], str]:
    module_name, _, name = target.partition(":")
    try:
        function: Callable[[Mapping[str, Any]], str] = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise EngineError(
            f"rollout.gold_response={target} cannot be loaded: {error}. Set it to module:function."
        ) from None
    return function


def read_script(path: str) -> dict[str, ScriptEntry]:
    """Read a jsonl of {"id": ..., "responses": [...]} or {"id": ..., "error": "..."}.

    Raises:
        EngineError: names the file and the line at fault.
    """
    try:
        return dict(_entry(f"rollout.script={path}, line {number}", row) for number, row in read_jsonl(path))
    except InputError as error:
        raise EngineError(f"rollout.script: {error}") from error


def _entry(where: str, row: Mapping[str, Any]) -> tuple[str, ScriptEntry]:
    if "id" not in row or not (row.get("responses") or row.get("error")):
        raise EngineError(
            f'{where}: expected {{"id": ..., "responses": [...]}} or {{"id": ..., "error": ...}}, got {row!r:.200}'
        )
    return str(row["id"]), ScriptEntry(tuple(row.get("responses") or ()), row.get("error"))
