"""The lines at the end of a run."""

from __future__ import annotations

from rsgrpo.records.summary import scores, warnings


def test_scores_before_and_after_and_what_never_moved() -> None:
    rows = [
        {"step": 0, "val/sampled/accuracy": 0.5, "val/sampled/format": 0.0, "val/sampled/num_prompts": 4.0},
        {"step": 1, "reward/accuracy/mean": 0.5, "reward/evidence/mean": 0.0},
        {"step": 2, "val/sampled/accuracy": 0.75, "val/sampled/format": 0.0, "val/greedy/accuracy": 0.611},
    ]
    assert scores(rows) == {
        "val/greedy/accuracy": "0.611 (one validation)",
        "val/sampled/accuracy": "0.500 → 0.750",
        "always zero": "val/sampled/format, reward/evidence/mean",
    }
    assert scores([]) == {}


def test_what_the_scores_hide() -> None:
    rows = [
        {"actor/skipped": 1.0, "reward/good/mean": 0.5, "reward/bad/errors": 3.0},
        {"actor/skipped": 1.0, "val/sampled/bad_errors": 2.0, "val/sampled/prompt_errors": 1.0},
    ]
    nothing, failed, idle = warnings(rows, ["good", "bad", "idle"])
    assert nothing.startswith("none of the 2 steps updated the model")
    assert failed.startswith("reward 'bad' failed 5 times and was skipped")
    assert failed.endswith("run.log has a traceback; it never gave a score.")
    assert idle == "reward 'idle' applied to no response: it taught nothing."
    assert warnings([{"actor/skipped": 1.0}, {"actor/skipped": 0.0}], ["good"]) == []
