"""Say where in its author's code a reward failed. Standard library only."""

from __future__ import annotations

import inspect
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rewards.api import RewardError


def where_raised(error: BaseException, function: Callable[..., Any]) -> str:
    """Return the line of the reward's author at which an error came up: "my_rewards.py:12, in judge: return 1 / 0".

    function: the reward; an error about the value that it returned is reported at its own first line.
    """
    code = inspect.unwrap(getattr(function, "func", function)).__code__
    if isinstance(error, RewardError):
        return f"{_short(code.co_filename)}:{code.co_firstlineno}, in {code.co_name}"
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [frame for frame in frames if frame.filename == code.co_filename or _is_near(frame.filename)]
    frame = (theirs or frames)[-1]
    line = f": {frame.line}" if frame.line else ""
    return f"{_short(frame.filename)}:{frame.lineno}, in {frame.name}{line}"


def _is_near(file: str) -> bool:
    """Whether a file is the user's own: in the current folder, and neither installed nor a part of this package."""
    place = Path(file)
    return (
        place.is_relative_to(Path.cwd())
        and "site-packages" not in place.parts
        and not place.is_relative_to(Path(__file__).resolve().parents[1])
    )


def _short(file: str) -> str:
    return os.path.relpath(file) if Path(file).is_relative_to(Path.cwd()) else file
