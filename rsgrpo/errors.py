"""The errors that a user can mend. Imports nothing, so that they can be raised before anything heavy is loaded."""

from __future__ import annotations


class RsgrpoError(Exception):
    """Base of every error that a user can mend; its text names the value, the limit and the fix."""


class ConfigError(RsgrpoError):
    """A setting, or a combination of settings, that cannot work."""
