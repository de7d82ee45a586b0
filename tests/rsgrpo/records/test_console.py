"""What the driver prints."""

from __future__ import annotations

import io
import logging
import sys
import time

import pytest

from rewards import adapters, evisrag
from rewards.api import Response, bind_reward, reward
from rsgrpo.records.console import Console, format_step, format_validation, num_in_step_line, short, short_names

NAMES = {"accuracy": "acc", "evidence": "evid", "well_formed": "fmt"}
SHOWN = {name: getattr(evisrag, name) for name in NAMES}
METRICS = {
    "reward/well_formed/mean": 0.99,
    "reward/evidence/mean": 0.78,
    "reward/overlong/mean": -1.0,
    "reward/accuracy/mean": 0.634,
    "rollout/num_tokens_mean": 70.6,
    "actor/kl": 0.0021,
    "time/step": 12.34,
    "time/sample": 5.1,
    "time/learn": 6.0,
    "time/sync": 0.2,
}


def test_a_step_is_one_line_with_its_leading_rewards() -> None:
    assert format_step(12, 60, METRICS, NAMES) == (
        "step 12/60  acc .63  evid .78  fmt .99  len 71  kl .002  12.3 s (sample 5.1 learn 6.0 sync .2)"
    )


def test_own_rewards_have_a_place_in_the_line_and_failures_are_counted() -> None:
    @reward
    def mine(response: Response) -> float:
        return 1.0

    shipped = {name: getattr(evisrag, name) for name in ("overlong", "well_formed", "think_differs", "accuracy")}
    rewards = {
        **shipped,
        "mine": mine,
        "loose": bind_reward(mine, {}),
        "old": bind_reward(adapters.trl, {"function": "m:f"}),
    }
    assert list(short_names(rewards)) == [
        "well_formed",
        "accuracy",
        "mine",
        "loose",
        "old",
        "overlong",
        "think_differs",
    ]
    assert num_in_step_line(rewards) == 5
    assert num_in_step_line(shipped) == 3
    metrics = {f"reward/{name}/mean": 1.0 for name in shipped} | {"reward/loose/mean": 0.5, "reward/mine/errors": 8.0}
    line = format_step(1, 9, metrics, short_names(rewards), 4)
    assert line == "step 1/9  fmt 1.00  acc 1.00  loose .50  overlong 1.00  mine failed 8x"


def test_a_validation_line_counts_failures() -> None:
    metrics = {"val/sampled/accuracy": 0.5, "val/sampled/evidence_errors": 3.0, "val/sampled/prompt_errors": 1.0}
    assert format_validation(1, 9, metrics, NAMES) == [
        "step 1/9  val sampled  acc .500  evid failed 3x  prompt_errors 1"
    ]


def test_what_a_step_did_not_measure_is_left_out() -> None:
    assert format_step(3, 100, {"actor/skipped": 1.0, "actor/active_terms": 2.0}, {}) == "step   3/100  no update"
    nothing_to_learn = {"actor/skipped": 1.0, "actor/active_terms": 0.0}
    assert format_step(3, 100, nothing_to_learn, {}) == "step   3/100  no update: every advantage is 0"


def test_a_step_with_an_environment_shows_turns_and_faults() -> None:
    metrics = {"rollout/num_tokens_mean": 71.0, "rollout/turns_mean": 2.5, "rollout/turns/timeout": 3.0}
    metrics["rollout/turns/bad_call"] = 1.0
    assert format_step(3, 9, metrics, {}) == "step 3/9  len 71  turns 2.50  faults timeout 3x, bad_call 1x"


def test_a_supervised_step_shows_its_loss() -> None:
    assert format_step(3, 100, {"actor/loss": 1.2345, "time/step": 2.0}, {}) == "step   3/100  loss 1.234  2.0 s"


def test_validation_has_a_line_for_each_mode() -> None:
    metrics = {"val/greedy/accuracy": 0.975, "val/greedy/num_prompts": 40.0, "val/sampled/accuracy": 0.5}
    assert format_validation(10, 60, metrics, NAMES) == [
        "step 10/60  val greedy   acc .975  num_prompts 40",
        "step 10/60  val sampled  acc .500",
    ]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.634, ".63"),
        (-0.5, "-.50"),
        (12.34, "12.34"),
        (0.0, ".00"),
        (0.0021, ".002"),
        (0.00003, "3e-05"),
        (1.0, "1.00"),
    ],
)
def test_short_numbers_drop_their_leading_zero(value: float, text: str) -> None:
    assert short(value) == text


def test_output_that_is_no_terminal_is_plain_lines() -> None:
    stream = io.StringIO()
    with Console(stream, rewards=SHOWN) as console:
        with console.phase("sample", total=2) as bar:
            bar.advance()
            bar.update(2, 2)
        console.info("loading [bold]x[/bold]")
        console.warning("odd")
        console.step_line(12, 60, METRICS)
        console.validation_line(12, 60, {"val/greedy/accuracy": 1.0})
        console.summary("done", [("steps", "60"), ("report", "runs/a/report.html")])
    assert stream.getvalue().splitlines() == [
        "loading [bold]x[/bold]",
        "warning: odd",
        format_step(12, 60, METRICS, NAMES),
        "step 12/60  val greedy   acc 1.000",
        "done",
        "  steps   60",
        "  report  runs/a/report.html",
    ]


def test_log_lines_are_printed_above_the_bars_and_go_back_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    stream, root = io.StringIO(), logging.getLogger()
    handler = logging.StreamHandler(sys.stderr)
    root.addHandler(handler)
    try:
        with Console(stream, live=True) as console, console.phase("sample"):
            root.warning("while it samples")
        root.warning("afterwards")
    finally:
        root.removeHandler(handler)
    assert "while it samples" in stream.getvalue()
    assert capsys.readouterr().err == "afterwards\n"


def test_a_terminal_shows_bars_and_keeps_the_lines() -> None:
    stream = io.StringIO()
    with Console(stream, live=True, rewards=SHOWN) as console:
        with console.phase("sample", total=96) as bar:
            bar.advance(48)
            console.info("hello")
            time.sleep(0.25)  # bars are drawn ten times a second
        with console.phase("learn"):
            pass
        console.step_line(1, 60, METRICS)
        console.summary("done", [("steps", "60")])
    shown = stream.getvalue()
    assert "\x1b[" in shown
    assert all(text in shown for text in ("sample", "48/96", "hello", "acc .63", "done"))
    console.info("after the end")
    assert "after the end" in stream.getvalue()
