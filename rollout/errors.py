"""The errors that a user can mend. Imports nothing, so that they can be raised before anything heavy is loaded.

Their class decides a program's exit code, the same for every command: see docs/configuration.md.
"""

from __future__ import annotations

USER_ERROR, RUN_ERROR = 2, 1


class RsgrpoError(Exception):
    """Base of every error that a user can mend; its text names the value, the limit and the fix.

    By itself it is a failure of the work: something that could not be known before it began.
    """

    exit_code = RUN_ERROR


class SourceBroke(RsgrpoError):
    """Rows that are read while a run trains come no more: nothing is wrong with the run, and it can go on later."""


class InputError(RsgrpoError):
    """What the user gave cannot work (a setting, rows, a reward, a model, a file), and nothing has been started."""

    exit_code = USER_ERROR


class ConfigError(InputError):
    """A setting, or a combination of settings, that cannot work."""
