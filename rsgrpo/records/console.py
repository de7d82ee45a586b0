"""What the driver prints: progress bars below the messages on a terminal, one plain line per step elsewhere."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import IO, Any

from rich.console import Console as RichConsole
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from rewards.api import Reward
from rollout.errors import printable

WHOLE_NUMBERS = ("num_prompts", "prompt_errors", "num_tokens")
ERRORS = "_errors"
STEP_REWARDS = 3
MAX_STEP_REWARDS = 8
PHASES = ("sample", "reference", "learn", "sync")
TURN_FAULTS = "rollout/turns/"
PLAIN_WIDTH = 120


class Bar:
    """Progress of one phase; without `progress` nothing is drawn."""

    def __init__(self, progress: Progress | None = None, task: TaskID | None = None) -> None:
        self._progress = progress or Progress(disable=True)
        self._task = self._progress.add_task("") if task is None else task

    def advance(self, count: int = 1) -> None:
        """Move the bar by `count`."""
        self._progress.advance(self._task, count)

    def update(self, done: int, total: int | None = None) -> None:
        """Set how much is done and, if it is known only now, how much there is to do."""
        self._progress.update(self._task, completed=done, total=total)


class Console:
    """The driver's output. Use it as a context manager, or call `close`, to leave the terminal clean.

    On a terminal the bars stay at the bottom and messages scroll above them; elsewhere no bars are drawn.
    """

    def __init__(
        self, stream: IO[str] | None = None, *, live: bool | None = None, rewards: Mapping[str, Reward] | None = None
    ) -> None:
        """Write to `stream` (stdout by default).

        live: whether to draw bars; None asks the stream. rewards: of a run, and its monitors, for their lines.
        """
        stream = stream or sys.stdout
        self.names, self._num_rewards = short_names(rewards or {}), num_in_step_line(rewards or {})
        self.live = stream.isatty() if live is None else live
        width = None if self.live else PLAIN_WIDTH
        self._rich = RichConsole(file=stream, width=width, highlight=False, force_terminal=self.live or None)
        columns = (SpinnerColumn(), TextColumn("{task.description:<10}"), BarColumn(bar_width=32))
        self._progress = Progress(
            *columns,
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self._rich,
            transient=True,
            disable=not self.live,
        )
        self._steps: TaskID | None = None
        self._moved_handlers: list[logging.StreamHandler[Any]] = []
        if self.live:
            before = sys.stderr
            self._progress.start()  # replaces stderr with a stream that prints above the bars; log lines go there too
            self._moved_handlers = _move_log_handlers(before, sys.stderr)

    def __enter__(self) -> Console:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the bars; messages still work afterwards. May be called twice."""
        if self._progress.live.is_started:
            self._progress.stop()
            for handler in self._moved_handlers:
                handler.setStream(sys.stderr)

    def info(self, message: str) -> None:
        """Print one message."""
        self._print(escape(message))

    def warning(self, message: str) -> None:
        """Print one message that stands out."""
        self._print(f"[yellow]warning:[/yellow] {escape(message)}")

    def step_line(self, step: int, total: int, metrics: Mapping[str, float]) -> None:
        """Print one step's result and move the outer bar to it."""
        line = format_step(step, total, metrics, self.names, self._num_rewards)
        self._print(escape(line))
        if self._steps is None:
            self._steps = self._progress.add_task("steps", total=total)
        self._progress.update(self._steps, completed=step, total=total)

    def validation_line(self, step: int, total: int, metrics: Mapping[str, float]) -> None:
        """Print the results of a validation, one line per mode."""
        for line in format_validation(step, total, metrics, self.names):
            self._print(escape(line))

    @contextmanager
    def phase(self, name: str, total: int | None = None) -> Iterator[Bar]:
        """Show a bar for one phase of a step; `total` is None while the amount of work is unknown."""
        task = self._progress.add_task(name, total=total)
        try:
            yield Bar(self._progress, task)
        finally:
            self._progress.remove_task(task)

    def summary(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        """Print a table of names and values."""
        if not self.live:
            width = max((len(what) for what, _ in rows), default=0)
            self._print("\n".join([escape(title), *(f"  {escape(what):<{width}}  {escape(v)}" for what, v in rows)]))
            return
        table = Table(title=escape(title), title_justify="left", title_style="bold", show_header=False)
        for what, value in rows:
            table.add_row(escape(what), escape(value))
        self._rich.print(table)

    def _print(self, markup: str) -> None:
        self._rich.print(printable(markup), soft_wrap=True)


def _move_log_handlers(old: IO[str], new: IO[str]) -> list[logging.StreamHandler[Any]]:
    """Point the root logger's handlers from one stream to another and return those that were moved."""
    moved = [
        handler
        for handler in logging.getLogger().handlers
        if isinstance(handler, logging.StreamHandler) and handler.stream is old
    ]
    for handler in moved:
        handler.setStream(new)
    return moved


def short_names(rewards: Mapping[str, Reward]) -> dict[str, str]:
    """Return each reward's or monitor's name for narrow displays (`@reward(short=...)`).

    The leading ones come first, then those of the user's own.
    """
    ordered = sorted(rewards.items(), key=lambda item: (not item[1].leading, not is_own(item[1])))
    return {name: reward.short or name for name, reward in ordered}


def is_own(reward: Reward) -> bool:
    """Whether a reward is of the user's own making."""
    module: str = getattr(reward, "func", reward).__module__
    return module == "rewards.adapters" or not module.startswith("rewards.")


def num_in_step_line(rewards: Mapping[str, Reward]) -> int:
    """Return how many rewards a step's line shows: the leading ones and the user's own, and three if they are fewer."""
    wanted = sum(reward.leading or is_own(reward) for reward in rewards.values())
    return min(max(wanted, STEP_REWARDS), MAX_STEP_REWARDS)


def format_step(
    step: int, total: int, metrics: Mapping[str, float], names: Mapping[str, str], num_rewards: int = STEP_REWARDS
) -> str:
    """Return the line of a step, without what it did not measure.

    num_rewards: rewards that it has room for, in the order of `names`.

    Example: "step 12/60  acc .63  evid .78  fmt .99  len 71  kl .002  12.3 s (sample 5.1 learn 6.0 sync .2)"
    """
    parts = [f"step {step:>{len(str(total))}}/{total}"]
    rewards = [key.split("/")[1] for key in metrics if key.startswith("reward/") and key.endswith("/mean")]
    known = [name for name in names if name in rewards]
    shown = (known + [name for name in rewards if name not in names])[:num_rewards]
    parts += [f"{names.get(name, name)} {short(metrics[f'reward/{name}/mean'])}" for name in shown]
    failed = {key.split("/")[1]: metrics[key] for key in metrics if re.fullmatch(r"reward/[^/]+/errors", key)}
    parts += [f"{names.get(name, name)} failed {count:.0f}x" for name, count in failed.items()]
    if not shown and "actor/loss" in metrics:
        parts.append(f"loss {short(metrics['actor/loss'], 3)}")
    if "rollout/num_tokens_mean" in metrics:
        parts.append(f"len {metrics['rollout/num_tokens_mean']:.0f}")
    if "rollout/turns_mean" in metrics:
        parts.append(f"turns {short(metrics['rollout/turns_mean'])}")
    faults = [f"{key.rsplit('/', 1)[-1]} {count:.0f}x" for key, count in metrics.items() if key.startswith(TURN_FAULTS)]
    parts += [f"faults {', '.join(faults)}"] if faults else []
    for label, key in (("kl", "actor/kl"), ("grad", "actor/grad_norm")):
        if key in metrics:
            parts.append(f"{label} {short(metrics[key])}")
    phases = [f"{name} {short(metrics[f'time/{name}'], 1)}" for name in PHASES if f"time/{name}" in metrics]
    if "time/step" in metrics:
        parts.append(f"{metrics['time/step']:.1f} s" + (f" ({' '.join(phases)})" if phases else ""))
    if metrics.get("actor/skipped"):
        parts.append("no update" + (": every advantage is 0" if metrics.get("actor/active_terms") == 0 else ""))
    return "  ".join(parts)


def format_validation(step: int, total: int, metrics: Mapping[str, float], names: Mapping[str, str]) -> list[str]:
    """Return one line per validation mode.

    Example: "step 12/60  val sampled  acc .630  evid .781  fmt .990"
    """
    modes: dict[str, list[str]] = {}
    for key, value in metrics.items():
        if key.startswith("val/") and key.count("/") == 2:
            _, mode, name = key.split("/")
            reward = name.removesuffix(ERRORS)
            if name.endswith(ERRORS) and name not in WHOLE_NUMBERS:
                modes.setdefault(mode, []).append(f"{names.get(reward, reward)} failed {value:.0f}x")
                continue
            text = f"{value:.0f}" if name in WHOLE_NUMBERS else short(value, 3)
            modes.setdefault(mode, []).append(f"{names.get(name, name)} {text}")
    prefix = f"step {step:>{len(str(total))}}/{total}"
    return [f"{prefix}  val {mode:<7}  {'  '.join(parts)}" for mode, parts in modes.items()]


def short(value: float, digits: int = 2) -> str:
    """Return a number without its leading zero; small ones keep one significant digit.

    Example: 0.634 -> ".63", -0.5 -> "-.50", 12.34 -> "12.34", 0.0021 -> ".002", 0.00003 -> "3e-05".
    """
    if value != 0 and abs(value) < 0.5 * 10**-digits:
        text = f"{value:.3f}" if abs(value) >= 0.0005 else f"{value:.0e}"
    else:
        text = f"{value:.{digits}f}"
    return text.replace("0.", ".", 1) if text.lstrip("-").startswith("0.") else text
