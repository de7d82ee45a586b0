"""How a response lies in a row: the policy's own tokens, and between its turns what it read there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rollout.types import ImageSource, Observation
from rsgrpo.types import RsgrpoError, Sample


@dataclass(frozen=True, slots=True, eq=False)
class ResponseRow:
    """A response of T tokens with its observations, R tokens in all.

    name: for messages. token_ids_R: (R,) int64. own_T: (T,) int64, where in the row the policy's own tokens lie.
    observations: those in the row, in order.
    """

    name: str
    token_ids_R: np.ndarray
    own_T: np.ndarray
    observations: Sequence[Observation]

    @property
    def images(self) -> tuple[ImageSource, ...]:
        """All images of the row, in order."""
        return tuple(image for observation in self.observations for image in observation.images)


def observations_read(sample: Sample) -> list[Observation]:
    """Return the observations that some token of the policy follows; no others are in a row."""
    return [o for o in sample.observations if len(o.token_ids_S) and o.at < len(sample.token_ids_T)]


def row_length(sample: Sample) -> int:
    """Return how many tokens a response has in a row."""
    return len(sample.token_ids_T) + sum(len(observation.token_ids_S) for observation in observations_read(sample))


def response_row(name: str, sample: Sample) -> ResponseRow | None:
    """Return the row of a response; None where it read nothing: its row is its own tokens.

    Raises:
        RsgrpoError: its observations are not in the order of its tokens.
    """
    observations = observations_read(sample)
    if not observations:
        return None
    places = [0, *(observation.at for observation in observations)]
    if places != sorted(places):
        raise RsgrpoError(f"{name}: observations must be in the order of its tokens, got them at {places[1:]}")
    pieces: list[np.ndarray] = []
    own: list[np.ndarray] = []
    start = end = 0
    for observation in [*observations, None]:
        before, start = start, len(sample.token_ids_T) if observation is None else observation.at
        pieces.append(np.asarray(sample.token_ids_T[before:start], dtype=np.int64))
        own.append(np.arange(end, end + start - before))
        end += start - before
        if observation is not None:
            pieces.append(np.asarray(observation.token_ids_S, dtype=np.int64))
            end += len(observation.token_ids_S)
    return ResponseRow(name, np.concatenate(pieces), np.concatenate(own), observations)
