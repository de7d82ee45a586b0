"""The file of answers: one line per question, resumed after a stop, none mixed up or lost."""

from __future__ import annotations

import os

import pytest

from recipes.answers.batch import read_lines
from rollout.files import WriteError
from rollout.types import Prompt
from rsgrpo.errors import RsgrpoError
from tests.material.answering import Scripted, batch, lines_of, prompts_of
from tests.material.http_stub import ANSWER


def test_each_question_gets_one_line_with_all_fields(tmp_path):
    batch(prompts_of(3), Scripted(), tmp_path / "deep/out.jsonl")
    lines = lines_of(tmp_path / "deep/out.jsonl")
    assert [line["id"] for line in lines] == ["q0", "q1", "q2"]
    assert list(lines[0]) == [
        "id", "question", "answer", "insufficient", "observe", "evidence", "think", "citations", "format_ok", "errors",
        "raw", "finish_reason", "prompt_hash", "model", "num_prompt_tokens", "num_response_tokens",
    ]  # fmt: skip
    assert (lines[0]["answer"], lines[0]["raw"], lines[0]["format_ok"]) == ("16%", ANSWER, True)


def test_a_stopped_batch_resumes_where_it_was(tmp_path):
    out = tmp_path / "out.jsonl"
    with pytest.raises(RsgrpoError, match=r"down\n2 answers of this run and 0 earlier ones are kept in .*out.jsonl"):
        batch(prompts_of(5), Scripted(fail_after=2), out)
    assert [line["id"] for line in lines_of(out)] == ["q0", "q1"]
    second = Scripted()
    summary = batch(prompts_of(5), second, out)
    assert second.asked == ["q2", "q3", "q4"]
    assert (summary.asked, summary.reused, summary.failed) == (3, 2, 0)
    assert [line["id"] for line in lines_of(out)] == [f"q{number}" for number in range(5)]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk_is_one_message_that_says_how_to_resume(tmp_path, monkeypatch):
    monkeypatch.setattr("recipes.answers.batch._appending", lambda path: open("/dev/full", "w"))  # noqa: SIM115
    with pytest.raises(WriteError, match=r"out.jsonl cannot be written: No space left on device. Make room; then run"):
        batch(prompts_of(2), Scripted(), tmp_path / "out.jsonl")


def test_a_line_cut_off_by_a_crash_is_asked_again(tmp_path):
    out = tmp_path / "out.jsonl"
    batch(prompts_of(3), Scripted(), out)
    out.write_bytes(out.read_bytes()[:-20])
    second = Scripted()
    batch(prompts_of(3), second, out)
    assert second.asked == ["q2"]
    assert len(lines_of(out)) == 3


def test_failed_questions_are_asked_again(tmp_path):
    out = tmp_path / "out.jsonl"
    first = batch(prompts_of(2), Scripted(lambda prompt: "!page lost" if prompt.id == "q1" else ANSWER), out)
    assert first.failed == 1
    assert lines_of(out)[1] | {"prompt_hash": "", "id": ""} == {
        "id": "", "question": "", "answer": "", "insufficient": False, "observe": "", "evidence": [], "think": "",
        "citations": [], "format_ok": False, "errors": ["page lost"], "raw": "", "finish_reason": "error",
        "prompt_hash": "", "model": "model-a", "num_prompt_tokens": None, "num_response_tokens": None,
    }  # fmt: skip
    second = Scripted()
    assert batch(prompts_of(2), second, out).failed == 0
    assert second.asked == ["q1"]
    assert [line["finish_reason"] for line in lines_of(out)] == ["stop", "stop"]


def test_equal_questions_are_asked_once(tmp_path):
    prompts = [Prompt("a", "same"), Prompt("b", "same"), Prompt("c", "other"), Prompt("a", "same")]
    greedy = Scripted()
    summary = batch(prompts, greedy, tmp_path / "greedy.jsonl", share_equal=True)
    assert greedy.asked == ["a", "c"]
    assert (summary.asked, summary.shared) == (2, 1)
    assert [line["id"] for line in lines_of(tmp_path / "greedy.jsonl")] == ["a", "b", "c"]
    sampled = Scripted()
    batch(prompts, sampled, tmp_path / "sampled.jsonl")
    assert sampled.asked == ["a", "b", "c"]


def test_two_questions_with_one_id_are_refused(tmp_path):
    with pytest.raises(RsgrpoError, match="two different questions have the id 'a'"):
        batch([Prompt("a", "one"), Prompt("a", "two")], Scripted(), tmp_path / "out.jsonl")


def test_answers_to_another_prompt_or_model_are_not_mixed(tmp_path):
    out = tmp_path / "out.jsonl"
    batch([Prompt("a", "one")], Scripted(), out)
    with pytest.raises(RsgrpoError, match="answers question 'a' with another prompt"):
        batch([Prompt("a", "two")], Scripted(), out)
    other = Scripted()
    other.name = "model-b"
    with pytest.raises(RsgrpoError, match=r"another model \(model-a, now model-b\)"):
        batch([Prompt("a", "one")], other, out)


def test_a_file_that_is_something_else_is_left_alone(tmp_path):
    (tmp_path / "out.jsonl").write_text('{"id": "7", "text": "mine"}\n')
    with pytest.raises(RsgrpoError, match=r"line 1 of .* is not an answer that this program wrote"):
        read_lines(tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_text() == '{"id": "7", "text": "mine"}\n'
