"""The log file in a run's folder: every log line, and the whole traceback of what failed."""

from __future__ import annotations

import logging
import traceback
from pathlib import Path

LOG_FILE = "run.log"
TRACE = "trace"
"""Attribute of a log record, and of an exception, that holds a traceback for the file alone."""


class _WithTrace(logging.Formatter):
    """Formats a line, and below it the traceback that the record brings along."""

    def format(self, record: logging.LogRecord) -> str:
        trace = str(getattr(record, TRACE, "")).rstrip()
        return super().format(record) + (f"\n{trace}" if trace else "")


def log_to_folder(run_dir: Path) -> logging.Handler:
    """Append this process's log lines to the run's log file, which is made by the first of them.

    Several processes may write to it at once. Close the handler with `stop_logging`.
    """
    handler = logging.FileHandler(run_dir / LOG_FILE, encoding="utf-8", delay=True)
    handler.setFormatter(_WithTrace("%(asctime)s %(levelname).1s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)
    return handler


def stop_logging(handler: logging.Handler) -> None:
    """Take the handler away and close its file."""
    logging.getLogger().removeHandler(handler)
    handler.close()


def write_failure(handler: logging.Handler, error: BaseException) -> None:
    """Write an error to the file: its traceback, and the one of the process where it was raised."""
    causes: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in causes:
        causes.append(cause)
        cause = getattr(cause, "cause", None) or cause.__cause__ or cause.__context__
    remote = "".join(f"\n{getattr(each, TRACE)}" for each in causes if getattr(each, TRACE, ""))
    text = "".join(traceback.format_exception(error)) + remote
    record = logging.LogRecord("rsgrpo", logging.ERROR, "", 0, "the run ended with an error", (), None)
    setattr(record, TRACE, text)
    handler.emit(record)
