"""All that the author of an environment needs: a class with one method, and what it returns.

class Pages:
    stop = ("</open>",)                    # optional: strings that end a turn, beside end-of-text

    def __init__(self, prompt, folder):    # one object per rollout; `folder` from rollout.turns.arguments
        self.folder = folder

    def step(self, turn):                  # the text of a finished turn
        page = between(turn, "<open>", "</open>")
        if page is None:
            return None                    # the episode ends
        return Reply("Here it is: <image>", images=(f"{self.folder}/{page}.png",))
"""

from __future__ import annotations

import inspect
import json
import os
import pkgutil
import re
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from rollout.config import TurnsConfig
from rollout.errors import ConfigError, one_line
from rollout.types import ImageSource, Prompt

_FAULT = re.compile(r"[\w.-]{0,40}")  # becomes part of a metric's name


@dataclass(frozen=True, slots=True)
class Reply:
    """What an environment says to a turn.

    text: for the policy, with one `<image>` at the position of each image.
    images: paths or compressed bytes.
    facts: for rewards and reports, not for the policy; JSON values.
    fault: one word for what was wrong with the turn ("bad_call"), which is counted; `text` tells the policy.
    ends: the episode is over; `text` and `images` are then not used.

    Raises:
        TypeError, ValueError: a field is something else.
    """

    text: str = ""
    images: Sequence[ImageSource] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    fault: str = ""
    ends: bool = False

    def __post_init__(self) -> None:
        kinds: dict[str, Any] = {"text": str, "images": (list, tuple), "facts": Mapping, "fault": str}
        for name, kind in kinds.items():
            if not isinstance(value := getattr(self, name), kind):
                raise TypeError(f"Reply.{name} is a {type(value).__name__}: {value!r:.60}")
        self.text.encode()  # half a character cannot be tokenized
        if wrong := [image for image in self.images if not _is_source(image)]:
            raise TypeError(f"Reply.images are paths or compressed bytes, got {type(wrong[0]).__name__}")
        if not _FAULT.fullmatch(self.fault):
            raise ValueError(f"Reply.fault is one word of at most 40 characters, got {self.fault!r:.60}")
        try:
            json.dumps(dict(self.facts), default=str, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"Reply.facts are JSON values: {error}") from error


def _is_source(image: object) -> bool:
    return isinstance(image, str | bytes | os.PathLike) or callable(getattr(image, "read", None))


class Environment(Protocol):
    """One episode: made for a prompt, then told every finished turn of one rollout.

    Two attributes are optional: `stop`, strings that end a turn beside end-of-text, and `max_turn_tokens`, the limit of
    one turn. What several episodes share, such as an index, belongs in the module or the class: an engine's process
    makes one object per rollout.
    """

    def step(self, turn: str) -> Reply | Awaitable[Reply | None] | None:
        """Answer a turn; None ends the episode.

        An exception, or an answer that is not one, becomes an observation that tells the policy, and is counted.
        """
        ...


MakeEnvironment = Callable[[Prompt], Environment]


def load_environment(config: TurnsConfig) -> MakeEnvironment | None:
    """Return what makes an episode of the configured class for a prompt; None without an environment.

    Raises:
        ConfigError: it cannot be imported, lacks `step`, or takes other arguments.
    """
    target = config.environment
    if not target:
        return None
    key = "rollout.turns.environment"
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())
    module, colon, name = target.partition(":")
    if not colon or not module or not name:
        raise ConfigError(f"{key} is written module:Class, such as my_tools:Pages, got {target!r}")
    try:
        made: Any = pkgutil.resolve_name(target)
    except Exception as error:
        raise ConfigError(f"{key}={target} cannot be loaded: {type(error).__name__}: {one_line(error)}") from error
    if not callable(made) or (inspect.isclass(made) and not callable(getattr(made, "step", None))):
        raise ConfigError(f"{key}={target} is not an environment: a class with a method step(self, turn) is needed")
    try:
        inspect.signature(made).bind(None, **config.arguments)
    except TypeError as error:
        raise ConfigError(f"{key}={target} does not take (prompt, **rollout.turns.arguments): {error}") from None
    return lambda prompt: made(prompt, **config.arguments)


def stop_strings(environment: Environment) -> tuple[str, ...]:
    """Return the strings that end a turn, beside end-of-text; TypeError or ValueError if they are something else."""
    given = getattr(environment, "stop", ())
    stop = (given,) if isinstance(given, str) else tuple(given)
    if not all(stop):
        raise ValueError("`stop` has an empty string, which would end every turn at its first token")
    for string in stop:
        if not isinstance(string, str):
            raise TypeError(f"`stop` has a {type(string).__name__}: {string!r:.60}")
    return stop
