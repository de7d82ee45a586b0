"""The scripted engine: answers from a file, or the gold response. For tests and for dry runs of a training set-up.

It tokenises with the model folder's tokenizer and refuses the prompts that a real engine refuses; it loads no weights.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import cycle, islice
from typing import Any

import torch

from rollout.config import InputsConfig, RolloutConfig
from rollout.engine import Backend, EngineError, EngineOptions, check_sampling
from rollout.errors import InputError
from rollout.files import read_jsonl
from rollout.inputs.images import PromptError
from rollout.inputs.processor import InputProcessor
from rollout.turns.environment import load_environment
from rollout.turns.episode import begin_episodes
from rollout.types import Prompt, Rollout, RolloutGroup, SamplingParams


class FakeEngine:
    """Answers prompts from a script; a prompt that is not in it gets its gold response."""

    backend: Backend = "load"

    def __init__(self, model_path: str, rollout: RolloutConfig, inputs: InputsConfig, **options: Any) -> None:
        """Load the tokenizer, the script and the function that `rollout.gold_response` names.

        Args:
            options: fields of `EngineOptions`.

        Raises:
            EngineError: the script or the function cannot be loaded.
        """
        self.processor = InputProcessor(model_path, inputs, **EngineOptions(**options).source)
        self.weights_version = 0
        self._make_environment, self._limits = load_environment(rollout.turns), rollout.turns
        self._script = read_script(rollout.script) if rollout.script else {}
        self._compose = _load_function(rollout.gold_response) if rollout.gold_response else None

    def generate(
        self, prompts: Sequence[Prompt], sampling: SamplingParams, *, stop: Callable[[], bool] | None = None
    ) -> Iterator[RolloutGroup]:
        """Yield one group per prompt, in order; log-probabilities are 0."""
        check_sampling(sampling)
        for prompt in prompts:
            if stop is not None and stop():
                return
            try:
                num_prompt_tokens = len(self.processor.encode(prompt).token_ids_T)
                rollouts = [self._rollout(prompt, turns, sampling) for turns in self._responses(prompt)]
            except PromptError as error:
                yield RolloutGroup(prompt, (), error=str(error))
                continue
            yield RolloutGroup(prompt, tuple(islice(cycle(rollouts), sampling.group_size)), num_prompt_tokens)

    def _rollout(self, prompt: Prompt, turns: Sequence[str], sampling: SamplingParams) -> Rollout:
        """Return a response; with an environment, its turns until that ends the episode."""
        token_ids = [self.processor.encode_response(turn) for turn in turns]
        if self._make_environment is None:
            if len(token_ids) > 1:
                raise PromptError(
                    f"the script has {len(token_ids)} turns for {prompt.id!r}, but there is no "
                    "rollout.turns.environment to answer them"
                )
            kept = token_ids[0][: sampling.max_tokens]
            return self.processor.rollout(kept, [0.0] * len(kept), self.weights_version)
        (episode,) = begin_episodes(self._make_environment, prompt, 1, self.processor, self._limits)
        for turn in token_ids:
            left = sampling.max_tokens - episode.num_tokens
            kept = turn[:left]
            if episode.answer(kept, [0.0] * len(kept), is_cut=len(turn) >= left) is None:
                break
        else:  # the script has no further turn
            episode.end()
        return episode.rollout(self.weights_version)

    def load_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Consume the tensors."""
        for _ in named_tensors:
            pass

    def finish_weights(self, version: int) -> None:
        self.weights_version = version

    def count_vision(self, prompts: Sequence[Prompt]) -> list[tuple[int, int, int]]:
        return [self.processor.count_vision(prompt) for prompt in prompts]

    def stats(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        pass

    def _responses(self, prompt: Prompt) -> Sequence[Sequence[str]]:
        """Return the turns of each response."""
        scripted = self._script.get(prompt.id)
        if scripted is not None and scripted.get("error") is not None:
            raise PromptError(scripted["error"])
        responses = scripted["responses"] if scripted else [self._gold(prompt)]
        return [(turns,) if isinstance(turns, str) else turns for turns in responses]

    def _gold(self, prompt: Prompt) -> str | Sequence[str]:
        """Return the row's own gold response (`truth["gold"]`), what `rollout.gold_response` makes, or the answer."""
        truth = prompt.truth
        if truth.get("gold"):
            gold: str | Sequence[str] = truth["gold"]
            return gold
        if not truth.get("answers"):
            raise PromptError(f"prompt {prompt.id!r} is not in rollout.script and its row has no gold answer")
        if self._compose is None:
            return str(truth["answers"][0])
        try:
            return self._compose(truth)
        except ValueError as error:  # RewardError is one
            raise PromptError(f"prompt {prompt.id!r}: {error}") from error


def _load_function(target: str) -> Callable[[Mapping[str, Any]], str | Sequence[str]]:
    try:
        function: Callable[[Mapping[str, Any]], str | Sequence[str]] = pkgutil.resolve_name(target)
    except (ImportError, AttributeError, ValueError) as error:
        raise EngineError(
            f"rollout.gold_response={target} cannot be loaded: {error}. Set it to module:function."
        ) from None
    return function


def read_script(path: str) -> dict[str, dict[str, Any]]:
    """Return, by prompt id, the lines of a jsonl of {"id", "responses": [...]} or {"id", "error": "..."}.

    A response is a text, or the list of its turns for an environment.

    Raises:
        EngineError: names the file and the line at fault.
    """
    entries = {}
    try:
        for number, row in read_jsonl(path):
            if "id" not in row or not (row.get("responses") or row.get("error")):
                raise EngineError(
                    f'rollout.script={path}, line {number}: expected {{"id": ..., "responses": [...]}} or '
                    f'{{"id": ..., "error": ...}}, got {row!r:.200}'
                )
            entries[str(row["id"])] = row
    except InputError as error:
        raise EngineError(f"rollout.script: {error}") from error
    return entries
