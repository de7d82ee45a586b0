"""What supervised steps imitate: a row's answer column as written, or the turns of its trajectory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rollout.inputs.images import PromptError
from rollout.inputs.processor import InputProcessor
from rollout.types import Observation, Prompt
from rsgrpo.config.train import SftConfig
from rsgrpo.data.dataset import PromptDataset
from rsgrpo.data.turns import TURNS
from rsgrpo.errors import InputError, listed
from rsgrpo.learning.response_rows import row_length
from rsgrpo.types import Sample, TrainGroup


class GoldResponses:
    """Turns prompts into groups of one sample: the gold response, end-of-text behind it or behind each of its turns."""

    def __init__(self, config: SftConfig) -> None:
        self.config = config
        self._processor = InputProcessor(
            config.model.path,
            config.inputs,
            revision=config.model.revision,
            trust_remote_code=config.model.trust_remote_code,
        )

    def check(self, prompts: PromptDataset) -> None:
        """Refuse rows that cannot be imitated.

        Raises:
            InputError: lists them.
        """
        faults = [f"id {prompt.id}: {fault}" for prompt in prompts if (fault := self._encode(prompt)[1])]
        if faults:
            raise InputError(
                f"{self.config.data.train}: {len(faults)} of {len(prompts)} rows have no response to imitate:\n"
                f"{listed(faults)}\nFix them, or leave them out with data.bad_rows=drop"
            )

    def groups(self, prompts: Sequence[Prompt]) -> tuple[list[TrainGroup], int]:
        """Return a group of one sample per row that can be imitated, and how many rows cannot."""
        encoded = [(prompt, self._encode(prompt)[0]) for prompt in prompts]
        groups = [TrainGroup(prompt, (sample,)) for prompt, sample in encoded if sample is not None]
        return groups, len(prompts) - len(groups)

    def _encode(self, prompt: Prompt) -> tuple[Sample | None, str]:
        """Return the response, or None and why there is none."""
        text, turns = prompt.truth.get("gold"), prompt.truth.get(TURNS)
        if text is None and not turns:
            return None, f"column {self.config.data.columns['answer']!r} holds a list of answers, not a response"
        try:
            sample = imitated(turns, self._processor) if turns else _sample(self._processor.encode_response(str(text)))
        except PromptError as error:
            return None, str(error)
        limit, num_tokens = self.config.max_response_tokens, len(sample.token_ids_T)
        if num_tokens > limit:
            return None, f"the response has {num_tokens:,} tokens, max_response_tokens is {limit:,}"
        row, most = prompt.num_tokens + row_length(sample), self.config.learner.max_tokens_per_micro_batch
        if row > most:
            parts = f"{prompt.num_tokens:,} + {num_tokens:,} + {row - prompt.num_tokens - num_tokens:,} = {row:,}"
            why = f"prompt, response and observations have {parts} tokens"
            return None, f"{why}, learner.max_tokens_per_micro_batch is {most:,}"
        return sample, ""


def imitated(turns: Sequence[Mapping[str, Any]], processor: InputProcessor) -> Sample:
    """Return a trajectory as an engine would have sampled it, every turn ended by end-of-text.

    turns: as `rsgrpo.data.turns.read_turns` returns them. One that is not learned is read, as its observation is.

    Raises:
        PromptError: a turn or an observation holds a control token, or an image cannot be read.
    """
    own: list[int] = []
    observations: list[Observation] = []
    for number, turn in enumerate(turns, start=1):
        token_ids, images = processor.encode_response(turn["turn"]), tuple(turn["images"])
        if turn["learn"]:
            own += token_ids
        if number < len(turns):
            between = processor.observation_ids(turn["observation"], images, has_ended=True)
            read = between if turn["learn"] else token_ids + between
            observations.append(Observation(len(own), 0, tuple(read), turn["observation"], images))
    return _sample(own, tuple(observations))


def _sample(token_ids: Sequence[int], observations: tuple[Observation, ...] = ()) -> Sample:
    """Return a response without scopes: supervised steps teach all of it."""
    none_KT = (0, len(token_ids))
    scope_KT, advantages_KT = np.zeros(none_KT, dtype=bool), np.zeros(none_KT, np.float32)
    return Sample(np.asarray(token_ids, dtype=np.int64), scope_KT, advantages_KT, observations=observations)
