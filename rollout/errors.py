"""The errors that a user can fix, and how a program ends with one. Standard library only.

The class of an error decides the exit code, in the same way for every command.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn

USER_ERROR, RUN_ERROR, INTERRUPTED = 2, 1, 130
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
MAX_LISTED = 10
"""Number of items that a message lists before it counts the rest."""


class RsgrpoError(Exception):
    """Base of every error that a user can fix; its text names the value, the limit and the fix.

    Raised directly, it is a failure that could not be known before the work began.
    """

    exit_code = RUN_ERROR


class SourceBroke(RsgrpoError):
    """The source of rows that are streamed during training failed; the run itself is fine and can be resumed."""


class WorkerError(RsgrpoError):
    """A worker (an engine, a learner rank, a process with rewards) raised, died or was too slow.

    cause: the exception behind it, None when it was too slow. is_lost: another worker in its place could do the work.
    died: its process or its node is gone.
    """

    def __init__(
        self, message: str, cause: BaseException | None = None, *, is_lost: bool = False, died: bool = False
    ) -> None:
        super().__init__(_COLOURS.sub("", message))
        self.cause = cause
        self.is_lost = is_lost
        self.died = died


class InputError(RsgrpoError):
    """The input cannot work (a setting, rows, a reward, a model, a file), and nothing has been started."""

    exit_code = USER_ERROR


class ConfigError(InputError):
    """A setting, or a combination of settings, that cannot work."""


def listed(items: Sequence[str], limit: int = MAX_LISTED) -> str:
    """Return the items on indented lines of their own; those beyond `limit` are counted.

    >>> print(listed(["row 1: no answer", "row 2: no answer"], limit=1))
      row 1: no answer
      ... and 1 more
    """
    more = [f"... and {len(items) - limit} more"] if len(items) > limit else []
    return "\n".join(f"  {line}" for line in [*items[:limit], *more])


def printable(text: str) -> str:
    r"""Return text from a model, a file or another program for a terminal: control characters but \n and \t as \xNN.

    A terminal obeys some of them: it moves the cursor, sets its title, or fills the clipboard.
    """
    text = text.encode("utf-8", "backslashreplace").decode()
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda found: f"\\x{ord(found[0]):02x}", text)


def one_line(error: object, limit: int = 200) -> str:
    """Return what an error says as one printable line of at most `limit` characters."""
    text = printable(" ".join(str(error).split()))
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


_leaves_at_once = False


def leave_at_once() -> None:
    """Let this process end without exit handlers: a library would wait in them for what is gone."""
    global _leaves_at_once
    _leaves_at_once = True


def leave(code: int, *, at_once: bool = False) -> NoReturn:
    """End this process; without exit handlers if `at_once`, or after `leave_at_once`."""
    if at_once or _leaves_at_once:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def run_program(work: Callable[[], int | None], *, kept: str = "", extras: Mapping[str, str] | None = None) -> int:
    """Run a command-line program's work and return its exit code; a user error becomes one message.

    Exit codes: what `work` returns (None is 0), 2 for wrong input, 1 for a failure, 130 after Ctrl-C.

    Args:
        kept: what a Ctrl-C leaves behind, such as "answers so far are kept; run the same command to resume".
        extras: import name of an optional package -> the extra of this project that installs it.
    """
    try:
        code = work() or 0
        sys.stdout.flush()
        return code
    except RsgrpoError as error:
        return _ended(f"error: {error}", error.exit_code)
    except ModuleNotFoundError as error:
        extra = (extras or {}).get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        install = f'install the extra, for example with `pip install -e ".[{extra}]"`'
        return _ended(f"error: {error.name} is not installed; {install}", USER_ERROR)
    except BrokenPipeError:  # the reader, such as `head`, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # its text names the path that cannot be read or written
        return _ended(f"error: {error}", RUN_ERROR)
    except KeyboardInterrupt:
        return _ended(f"Stopped; {kept}." if kept else "Stopped.", INTERRUPTED)


def _ended(message: str, code: int) -> int:
    print(printable(message), file=sys.stderr)
    return code
