"""recipes.infer: what a person sees at the terminal, the command line, and engines in this process."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from recipes.answers.batch import result_line
from recipes.answers.engine import open_answerer
from recipes.answers.reader import Reader
from recipes.answers.spec import AnswerModelConfig, AnswerRolloutConfig, AnswerSpec, pixel_limits
from recipes.answers.types import Answer
from recipes.infer import Session, converse, main
from rollout.config import InputsConfig
from rollout.types import Observation, Prompt
from rsgrpo.errors import RsgrpoError
from tests.material.answering import SMALL, Scripted, batch, lines_of, prompts_of
from tests.material.http_stub import ANSWER

# The terminal


def session(out, answerer=None, images=("a.png",)):
    return Session(Reader(answerer or Scripted(), "{images}{question}"), images, out)


def test_an_answer_is_shown_with_its_evidence_and_faults():
    out = io.StringIO()
    session(out, images=("a.png", "b.png")).ask("how much?")
    assert out.getvalue() == ("<obs\nanswer: 16%\nevidence:\n  [1] a.png: 16%\nfault: no evidence slot for page 2\n")


def test_a_conversation_goes_on_after_errors_and_changes_pages(tmp_path, page):
    out = io.StringIO()
    typed = io.StringIO(f"how much?\n\n/images {page} none.png\n/images {page}\nwho?\n/json\n/what\n/quit\nnever\n")
    answerer = Scripted()
    converse(session(out, answerer), typed, out, prompts_user=True)
    assert answerer.asked == ["question-1", "question-2"]
    shown = out.getvalue()
    assert "error: no such image: none.png" in shown
    assert f"[1] {page}: 16%" in shown
    assert '"id": "question-2"' in shown
    assert shown.count("/images A.png") == 2


def test_an_output_with_an_error_keeps_its_text():
    line = result_line(Answer(Prompt("q", "t"), "<answer>16", "error", "the answer broke off"), "m")
    assert (line["answer"], line["errors"][0], line["finish_reason"]) == ("16", "the answer broke off", "error")


def looked_up(text, *steps):
    prompt = Prompt("q", "write <evidence> and <answer>")
    return result_line(Answer(prompt, text, "stop", observations=steps), "m")


def test_a_trajectory_is_not_told_of_blocks_that_its_prompt_does_not_ask_for():
    found = {"call": "search", "numbers": [1, 2], "pages": ["a", "b"]}
    steps = [
        Observation(0, 18, (), "[1]<image>[2]<image>", (b"small", b"small"), found),
        Observation(0, 33, (), "[2]<image>", ("/store/b.png",), {"call": "open", "number": 2}),
    ]
    text = "<search>x</search>\n<open>2</open>\n<evidence>\n[2]: seven\n</evidence><answer>7</answer>"
    line = looked_up(text, *steps)
    assert line["errors"] == ()
    assert [slot["image"] for slot in line["evidence"]] == ["/store/b.png"]
    assert looked_up("<answer>7</answer>", *steps)["errors"] == ("no <evidence> block",)
    assert looked_up(text[:33], *steps)["answer"] == ""
    odd = Observation(0, 3, (), "?", (), {"numbers": 3, "number": "x", "call": "open"})  # of another environment
    assert looked_up("one\n<answer>7</answer>", odd)["answer"] == "7"


# The command line


def write_questions(folder: Path, page: str, count: int = 3) -> Path:
    rows = [{"qid": f"q{number}", "query": f"question {number}", "image": [page]} for number in range(count)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "rows.jsonl"


def test_a_file_is_answered_from_the_command_line(serve, tmp_path, page, capsys):
    arguments = ["--batch", str(write_questions(tmp_path, page)), "--endpoint", serve().url, "--max-pixels", "300000"]
    assert main(arguments) == 0
    assert [line["answer"] for line in lines_of(tmp_path / "rows.answers.jsonl")] == ["16%"] * 3
    assert "asked" in capsys.readouterr().err
    assert main([*arguments, "--prompt", "direct"]) == 2
    assert "with another prompt" in capsys.readouterr().err


def test_one_question_is_answered_as_json(serve, page, capsys):
    assert main(["how much?", "--image", page, "--endpoint", serve().url, "--json"]) == 0
    line = json.loads(capsys.readouterr().out)
    assert (line["answer"], line["evidence"][0]["image"], line["model"]) == ("16%", page, "served-model")


def test_one_question_streams_to_the_terminal(serve, page, capsys):
    assert main(["how much?", "--image", page, "--endpoint", serve().url]) == 0
    assert capsys.readouterr().out.startswith(f"{ANSWER}\nanswer: 16%\n")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["q", "--image", "none.png"], "no such image: none.png"),
        (["q"], "--model is empty"),
        (["q", "--engine", "fake"], "--model is empty: the fake engine has no weights, but the tokenizer of a model"),
        (["q", "--model", "none/of/this"], "there is no such file or folder"),
        (["q", "--model", "runs/demo/exprt"], "Run `make demo`"),
        (["q", "--model", "runs/gone"], "there is no such file or folder"),
        (["q", "--prompt", "nothing"], "neither a file nor one of"),
        (["q", "--prompt", "raw"], "has no template"),
        (["--batch", "none.jsonl"], "does not exist"),
        (["q", "--batch", "none.jsonl"], "brings its own questions"),
        (["q", "--max-images", "-1", "--model", "m"], "--max-images must be >= 0, got -1"),
        (["q", "--max-pixels", "5", "--model", "m"], "--min-pixels must be <= --max-pixels"),
    ],
)
def test_mistakes_are_one_line_each(arguments, complaint, capsys, serve):
    if "--batch" in arguments and "q" not in arguments:
        arguments = [*arguments, "--endpoint", serve().url]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert complaint in error
    assert "Traceback" not in error


def test_ctrl_c_says_that_the_answers_are_kept(monkeypatch, capsys):
    def interrupted(_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("recipes.infer.answer", interrupted)
    assert main(["--batch", "rows.jsonl"]) == 130
    assert capsys.readouterr().err == "Stopped; answers so far are kept; run the same command to resume.\n"


def test_an_engine_answers_in_process(tmp_path, page, tiny_model_path):
    script = tmp_path / "script.jsonl"
    script.write_text(json.dumps({"id": "q0", "responses": [ANSWER]}) + "\n")
    rollout = AnswerRolloutConfig(engine="fake", script=str(script), max_batch_sequences=2)
    answerer = open_answerer(AnswerSpec(AnswerModelConfig(tiny_model_path), rollout, SMALL))
    prompts = [*prompts_of(3, page)[:2], Prompt("q2", "<image>", (page,), {"answers": ["7"], "evidence": ["seven"]})]
    found = {output.prompt.id: output for output in answerer.answer(prompts)}
    assert (found["q0"].text, found["q0"].finish_reason) == (ANSWER, "length" if len(ANSWER) > 10_000 else "stop")
    assert "not in rollout.script" in found["q1"].error
    assert "<answer>7</answer>" in found["q2"].text
    assert [output.text for output in answerer.stream(prompts[0]) if isinstance(output, Answer)] == [ANSWER]
    answerer.close()


def test_a_model_that_cannot_start_is_one_clear_error(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    answerer = open_answerer(AnswerSpec(AnswerModelConfig(str(tmp_path)), inputs=SMALL))
    with pytest.raises(RsgrpoError, match="cannot be started"):
        list(answerer.answer(prompts_of(1)))
    answerer.close()


def test_a_finished_file_starts_no_engine(tmp_path):
    out = tmp_path / "out.jsonl"
    first = Scripted()
    first.name = str(tmp_path)
    batch(prompts_of(2), first, out)
    (tmp_path / "config.json").touch()
    empty_folder = open_answerer(AnswerSpec(AnswerModelConfig(str(tmp_path)), inputs=SMALL))
    assert batch(prompts_of(2), empty_folder, out).reused == 2


def test_pages_are_resized_as_the_models_folder_was_trained(tmp_path):
    defaults = (InputsConfig().min_pixels, InputsConfig().max_pixels)
    assert pixel_limits("org/hub-model") == defaults
    config = tmp_path / "preprocessor_config.json"
    config.write_text(json.dumps({"size": {"shortest_edge": 784, "longest_edge": 50_176}}))
    assert pixel_limits(str(tmp_path)) == (784, 50_176)
    config.write_text(json.dumps({"size": {"shortest_edge": 3136, "longest_edge": 12_845_056}}))
    assert pixel_limits(str(tmp_path)) == defaults
