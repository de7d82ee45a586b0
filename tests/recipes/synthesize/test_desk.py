"""Looking up answers at the page desk through an endpoint: what is kept, what rows hold, and what infer shows."""

from __future__ import annotations

import json

import pytest

from recipes import infer
from recipes.answers.at_desk import desk_turns
from recipes.synthesize import commands as synthesize
from recipes.synthesize.desk import TOO_MANY_TURNS, UNSEEN, WRONG
from rollout.turns.environment import load_environment
from rollout.types import Prompt
from tests.material.answering import lines_of
from tests.material.retrieval import ingested, write_pdf

SEARCH, OPEN, BAD = "I look.\n<search>tax rate</search> and then", "<open>1</open>", "<open>one</open>"
ANSWER = "<evidence>\n[1]: 16 percent\n</evidence>\n<answer>16%</answer>"


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("desk")
    (folder / "docs").mkdir()
    write_pdf(folder / "docs" / "report.pdf", ["the tax rate is 16%", "a list of harbours", "rivers"])
    ingested(folder / "store", folder / "docs")
    return str(folder / "store")


def says(scripts):
    """Return a teacher that writes a script, chosen by the question, turn by turn."""

    def reply(_, body):
        content = body["messages"][-1]["content"]
        text = "".join(part.get("text", "") for part in content)
        script = scripts[next(name for name in scripts if f"Question: {name}" in text)]
        return script[min(text.count("\n\nYou wrote:\n"), len(script) - 1)]

    return reply


def test_trajectories_that_are_right_and_grounded_are_kept_with_what_the_desk_answered(serve, store, tmp_path):
    scripts = {
        "good": [SEARCH, BAD, OPEN, ANSWER],
        "wrong": [SEARCH, OPEN, ANSWER.replace("<answer>16%", "<answer>17%")],
        "unseen": [SEARCH, ANSWER],
        "endless": [SEARCH],
    }
    rows = [{"id": name, "question": name, "answer": ["16%"]} for name in scripts]
    (tmp_path / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    endpoint, out = serve(says(scripts)), tmp_path / "out" / "sft.jsonl"
    arguments = ["desk", "--store", store, "--in", str(tmp_path / "qa.jsonl"), "--out", str(out), "--tries", "1"]
    assert synthesize.main([*arguments, "--endpoint", endpoint.url]) == 0
    report = json.loads(out.with_suffix(".report.json").read_text())
    assert (report["kept"], report["rejected"]) == (1, {WRONG: 1, UNSEEN: 1, TOO_MANY_TURNS: 1})
    (row,) = lines_of(out)
    assert [turn["turn"] for turn in row["turns"]] == ["I look.\n<search>tax rate</search>", BAD, OPEN, ANSWER]
    assert [turn.get("learn", True) for turn in row["turns"]] == [True, False, True, True]
    make = load_environment(desk_turns(store))
    assert make is not None
    desk = make(Prompt("again", ""))
    for turn in row["turns"][:-1]:
        reply = desk.step(turn["turn"])
        assert turn["observation"] == reply.text  # type: ignore[union-attr]
        assert all((out.parent / image).is_file() for image in turn["images"])
    (gold,) = lines_of(out.with_suffix(".grpo.jsonl"))
    assert gold["gold_pages"] == [desk.step(OPEN).facts["page"]]  # type: ignore[union-attr]
    assert "turns" not in gold


def test_each_request_repeats_what_was_written_and_shown(serve, store, capsys):
    endpoint = serve(says({"rate?": [SEARCH, OPEN, ANSWER]}))
    assert infer.main(["rate?", "--desk", store, "--endpoint", endpoint.url]) == 0
    content = endpoint.bodies[-1]["messages"][-1]["content"]
    kinds = [part["type"] for part in content]
    assert kinds.count("image_url") == 2
    text = "".join(part.get("text", "") for part in content)
    assert text.index("You wrote:\nI look.") < text.index("The answer to that:\n[1] report.pdf, page 1 (")
    assert text.endswith("You wrote:\n<open>1</open>\n\nThe answer to that:\n[1]")
    shown = capsys.readouterr().out
    assert "<search>tax rate</search>\n    [1] report.pdf, page 1 (" in shown
    assert "<open>1</open>\n    [1] (image)\n" in shown
    assert "answer: 16%" in shown


def test_a_line_of_infer_holds_the_steps(serve, store, capsys):
    endpoint = serve(says({"rate?": [SEARCH, BAD, OPEN, ANSWER]}))
    assert infer.main(["rate?", "--desk", store, "--endpoint", endpoint.url, "--json"]) == 0
    line = json.loads(capsys.readouterr().out)
    assert [(step["call"], step["fault"]) for step in line["steps"]] == [
        ("search", ""), ("open", "bad_call"), ("open", ""),
    ]  # fmt: skip
    assert line["steps"][0]["query"] == "tax rate"


def test_a_conversation_that_fails_says_so(serve, store, capsys):
    endpoint = serve(lambda number, _: SEARCH if number == 1 else (400, {}, "too long"))
    assert infer.main(["rate?", "--desk", store, "--endpoint", endpoint.url]) == 1
    assert "HTTP 400" in capsys.readouterr().out
