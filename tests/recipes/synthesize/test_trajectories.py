"""Trajectories of a teacher: what is kept and why not, resuming after a stop, the pace, the rows and the report."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from recipes.answers.questions import Question
from recipes.synthesize import commands as synthesize
from recipes.synthesize.retries import CUT_OFF, FAILED, KEPT
from rewards.evisrag import read_gold
from tests.material.answering import lines_of
from tests.material.http_stub import Say, Teacher

NOTHING = "no relevant information"


def written(answer: str, *slots: str) -> str:
    lines = "".join(f"[{number}]: {slot}\n" for number, slot in enumerate(slots, start=1))
    return (
        f"<observe>two pages</observe>\n<evidence>\n{lines}</evidence>\n<think>from them</think>\n"
        f"<answer>{answer}</answer>"
    )


GOOD = written("16%", "Sweden 16%", NOTHING)


def question_of(content: list[dict[str, Any]]) -> str:
    """Return the question that is asked: q0, q1 or q2."""
    return str(re.findall(r"\bq\d\b", "".join(part.get("text", "") for part in content))[-1])


@pytest.fixture
def teach() -> Iterator[Callable[[Say], Teacher]]:
    with ExitStack() as stack:
        yield partial(Teacher, stack, question_of)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Three questions over two pages each."""
    folder = tmp_path / "mine"
    folder.mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (60, 40), "white").save(folder / name)
    rows = [{"id": f"q{n}", "question": f"q{n}", "image": ["a.png", "b.png"], "answer": ["16%"]} for n in range(3)]
    (folder / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "qa.jsonl"


def run(teacher: Teacher, source: Path, out: Path, *more: str) -> int:
    options = ["--endpoint", teacher.url, "--max-tries", "1", "--min-pixels", "784", "--max-pixels", "3136", *more]
    return synthesize.main(["trajectories", "--in", str(source), "--out", str(out), *options])


# The judgement


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        (GOOD, KEPT),
        (f"\n{GOOD}\n", KEPT),
        (GOOD.replace("</think>", ""), synthesize.MALFORMED),
        (f"Sure! {GOOD}", synthesize.MALFORMED),
        (written("16%", "Sweden 16%"), synthesize.WRONG_SLOTS),
        (written("16%", "Sweden 16%", NOTHING, "a third"), synthesize.WRONG_SLOTS),
        (written("16%", "Sweden 16%", ""), synthesize.WRONG_SLOTS),
        (written("17%", "Sweden 17%", NOTHING), synthesize.WRONG),
        (written("1.6%", "Sweden 1.6%", NOTHING), synthesize.WRONG),
        (written("insufficient to answer", NOTHING, NOTHING), synthesize.WRONG),
        (written("16%", NOTHING, NOTHING), synthesize.GROUNDLESS),
    ],
)
def test_what_is_kept(text, verdict):
    question = Question("q", "how much?", ("a", "b"), answers=("0.16", "16%"))
    assert synthesize.judge(question, {"raw": text, "finish_reason": "stop"}) == verdict


def test_a_cut_off_or_failed_response_is_not_kept():
    question = Question("q", "how much?", ("a", "b"), answers=("16%",))
    assert synthesize.judge(question, {"raw": GOOD, "finish_reason": "length"}) == CUT_OFF
    assert synthesize.judge(question, {"raw": GOOD, "finish_reason": "error"}) == FAILED


def test_a_right_abstention_needs_no_evidence():
    question = Question("q", "how much?", ("a",), answers=("insufficient to answer",), is_sufficient=False)
    text = written("insufficient to answer", NOTHING)
    assert synthesize.judge(question, {"raw": text, "finish_reason": "stop"}) == KEPT


# The command


def test_kept_rows_are_what_training_reads_and_the_report_counts_all(teach, source, tmp_path, capsys):
    wrong, malformed = written("17%", "17%", NOTHING), "16%"
    answers = {"q0": [GOOD], "q1": [wrong, malformed, GOOD], "q2": [wrong, wrong, wrong]}
    teacher = teach(lambda question, times: answers[question][times])
    out = tmp_path / "new" / "sft.jsonl"
    assert run(teacher, source, out, "--tries", "3", "--price-in", "2", "--price-out", "10") == 0
    rows = lines_of(out)
    assert [row["id"] for row in rows] == ["q0", "q1"]
    assert rows[0]["answer"] == GOOD
    assert rows[0]["image"] == ["../mine/a.png", "../mine/b.png"]
    assert rows[0]["prompt"].startswith("[1]: <image>\n[2]: <image>\n")
    assert read_gold(rows[0]["answer"], {}, 2)["evidence"] == ["Sweden 16%", NOTHING]
    gold = lines_of(tmp_path / "new" / "sft.grpo.jsonl")
    assert read_gold(gold[1]["answer"], {"evidence": gold[1]["evidence"]}, 2) == {
        "answers": ["16%"],
        "evidence": ["Sweden 16%", NOTHING],
    }
    report = json.loads((tmp_path / "new" / "sft.report.json").read_text())
    assert report == {
        "questions": 3,
        "kept": 2,
        "kept_by_try": {"1": 1, "3": 1},
        "responses": 7,
        "acceptance": 0.2857,
        "rejected": {"wrong answer": 4, "not the four blocks": 1},
        "prompt_tokens": 7000,
        "response_tokens": 700,
        "cost": 0.021,
        "cost_per_kept": 0.0105,
        "model": "teacher",
    }
    assert len(set(teacher.seeds)) == 7
    assert "4 x wrong answer" in capsys.readouterr().err


def test_a_teacher_that_goes_down_loses_nothing_and_the_same_command_resumes(teach, source, tmp_path, capsys):
    teacher = teach(lambda question, times: GOOD if question == "q0" else 401)
    out = tmp_path / "sft.jsonl"
    assert run(teacher, source, out, "--concurrency", "1") == 1
    assert "HTTP 401" in capsys.readouterr().err
    assert [row["id"] for row in lines_of(out)] == ["q0"]
    teacher.say = lambda question, times: GOOD
    assert run(teacher, source, out) == 0
    assert [row["id"] for row in lines_of(out)] == ["q0", "q1", "q2"]
    assert teacher.asked.count("q0") == 1
    num_asked = len(teacher.asked)
    assert run(teacher, source, out) == 0
    assert len(teacher.asked) == num_asked


def test_requests_keep_to_the_pace(teach, source, tmp_path):
    teacher = teach(lambda question, times: GOOD)
    assert run(teacher, source, tmp_path / "sft.jsonl", "--requests-per-minute", "600") == 0
    assert teacher.times[-1] - teacher.times[0] >= 0.18  # 3 requests, 0.1 s between


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--temperature", "0"], "--tries > 1 asks again"),
        (["--requests-per-minute", "5"], "and none is given"),
        (["--tries", "0"], "error: --tries must be >= 1, got 0"),
        (["--row-prompt", "raw"], "--row-prompt needs a template"),
    ],
)
def test_a_wrong_command_line_is_one_line(arguments, says, source, tmp_path, capsys):
    out = str(tmp_path / "out.jsonl")
    assert synthesize.main(["trajectories", "--in", str(source), "--out", out, "--model", "m", *arguments]) == 2
    assert says in capsys.readouterr().err


def test_rows_without_an_answer_are_refused(tmp_path, capsys):
    (tmp_path / "qa.jsonl").write_text('{"id": "q1", "question": "why?"}\n')
    arguments = ["--in", str(tmp_path / "qa.jsonl"), "--out", str(tmp_path / "o.jsonl"), "--model", "m"]
    assert synthesize.main(["trajectories", *arguments]) == 2
    assert "no gold answer" in capsys.readouterr().err
