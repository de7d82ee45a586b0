"""What supervised steps imitate: a row's answer column as written."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rollout.inputs.images import PromptError
from rollout.inputs.processor import InputProcessor
from rollout.types import Prompt
from rsgrpo.config.train import SftConfig
from rsgrpo.data.dataset import PromptDataset
from rsgrpo.errors import InputError, listed
from rsgrpo.types import Sample, TrainGroup


class GoldResponses:
    """Turns prompts into groups of one sample: the gold response, end-of-text appended."""

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
        groups = [TrainGroup(prompt, (_sample(ids),)) for prompt, ids in encoded if ids is not None]
        return groups, len(prompts) - len(groups)

    def _encode(self, prompt: Prompt) -> tuple[list[int] | None, str]:
        """Return the response's tokens, or None and why there are none."""
        text = prompt.truth.get("gold")
        if text is None:
            return None, f"column {self.config.data.columns['answer']!r} holds a list of answers, not a response"
        try:
            token_ids = self._processor.encode_response(text)
        except PromptError as error:
            return None, str(error)
        limit = self.config.max_response_tokens
        if len(token_ids) > limit:
            return None, f"the response has {len(token_ids):,} tokens, max_response_tokens is {limit:,}"
        return token_ids, ""


def _sample(token_ids: Sequence[int]) -> Sample:
    """Return a response without scopes: supervised steps teach all of it."""
    none_KT = (0, len(token_ids))
    return Sample(np.asarray(token_ids, dtype=np.int64), np.zeros(none_KT, dtype=bool), np.zeros(none_KT, np.float32))
