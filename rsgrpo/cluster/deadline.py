"""The time limit of start-up as a whole."""

from __future__ import annotations

import time

from rsgrpo.errors import RsgrpoError


class Deadline:
    """When everything must be up: `cluster.startup_timeout_s` after this was made."""

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self._ends = time.monotonic() + limit_s

    @property
    def left_s(self) -> float:
        """Seconds left; 0 when it has passed."""
        return max(0.0, self._ends - time.monotonic())

    def missed(self, who: str, what: str) -> RsgrpoError:
        """Return the error to raise when it has passed; it names who is still waited for, and to do what."""
        return RsgrpoError(
            f"The workers were not up within cluster.startup_timeout_s={self.limit_s:g} s: {who} had not finished "
            f"{what}. Look at its log and its node, or raise cluster.startup_timeout_s."
        )
