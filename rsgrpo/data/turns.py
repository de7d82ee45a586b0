"""Read the turns of a row: a trajectory to imitate, each turn with what an environment answered to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rollout.inputs.images import PromptError
from rollout.types import ImageSource
from rsgrpo.data.foreign import IMAGE_MARK
from rsgrpo.data.rows import ImageFolder, image_entries

TURNS = "turns"
"""Column of a row, and key of `Prompt.truth`: {"turn", "observation", "images", "learn"} of each turn."""


class BrokenTurns(ValueError):
    """The turns of a row cannot be imitated; the text says why."""


def has_turns(value: Any) -> bool:
    """Whether a column holds turns, and not something else of that name."""
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str | bytes)
        and any(isinstance(turn, Mapping) and "turn" in turn for turn in value)
    )


def read_turns(value: Sequence[Any], folder: ImageFolder) -> list[dict[str, Any]]:
    """Return turns with every key, and images as an engine takes them.

    turn: the policy's text. observation: the environment's answer, with one `<image>` at the position of each of the
    images; None behind the last turn, where the episode ends. learn: False for a turn that is read and not imitated.

    Raises:
        BrokenTurns: a turn is not such a mapping, one lacks the answer that the next one needs, or none is learned.
    """
    turns = [_read_turn(turn, f"turn {number}", folder) for number, turn in enumerate(value, start=1)]
    for number, turn in enumerate(turns[:-1], start=1):
        if turn["observation"] is None:
            raise BrokenTurns(f"turn {number} has no observation, but turn {number + 1} follows it")
    if not any(turn["learn"] for turn in turns):
        raise BrokenTurns("no turn is to be learned: every one has learn=false")
    return turns


def images_of(turns: Sequence[Mapping[str, Any]]) -> list[ImageSource]:
    """Return all images of some turns."""
    return [image for turn in turns for image in turn["images"]]


def _read_turn(turn: Any, where: str, folder: ImageFolder) -> dict[str, Any]:
    if not isinstance(turn, Mapping):
        raise BrokenTurns(f"{where} must be a mapping with 'turn', got {type(turn).__name__}")
    text, observation, learn = turn.get("turn"), turn.get("observation"), turn.get("learn")
    if not isinstance(text, str):
        raise BrokenTurns(f"'turn' of {where} must be text, got {type(text).__name__}")
    if not isinstance(observation, str | None):
        raise BrokenTurns(f"'observation' of {where} must be text, got {type(observation).__name__}")
    if not isinstance(learn, bool | None):
        raise BrokenTurns(f"'learn' of {where} must be true or false, got {learn!r:.80}")
    try:
        images = tuple(folder.resolve(entry) for entry in image_entries(turn.get("images")))
    except (ValueError, PromptError) as error:
        raise BrokenTurns(f"an image of {where}: {error}") from error
    num_marks = (observation or "").count(IMAGE_MARK)
    if num_marks != len(images):
        raise BrokenTurns(f"the observation of {where} has {num_marks} {IMAGE_MARK} marks for {len(images)} images")
    return {"turn": text, "observation": observation, "images": images, "learn": learn is not False}
