"""`python -m rewards`: trying a reward on a file of responses."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rewards.__main__ import highlight, main
from rewards.api import Span
from tests.material import DATA, ROOT

GOLDEN = str(DATA / "rewards.jsonl")
GOOD = "<observe>o</observe><evidence>[1]: 16</evidence><think>t</think><answer>16</answer>"
MODULE = """
from rewards.api import Credit, Response, Span, between, reward

@reward(scope=between("<think>", "</think>"))
async def async_page(response: Response, *, page: int = 1):
    return float(response.truth["page"] == page)

@reward
def fails(response):
    raise KeyError("no such thing")

@reward
def leaves(response):
    raise SystemExit(3)

@reward
def hangs(response):
    import time
    time.sleep(2)

def verl_like(data_source, solution_str, ground_truth, extra_info=None):
    return {"score": float(solution_str == ground_truth), "acc": 0}

@reward
def marked_verl(data_source, solution_str, ground_truth):
    return 1.0

def trl_like(completions, answers, **kwargs):
    return [float(text in gold) for text, gold in zip(completions, answers)]

def easy_like(reward_inputs, weight=0.1):
    return [{"overall": float(one["response"] == one["ground_truth"])} for one in reward_inputs]

@reward
def not_finite(response):
    return float("nan")

@reward
def sees(response):
    print(response.question, response.truncated, response.images, dict(response.truth), response.num_tokens)
    return None

@reward
def by_column(response):
    return None if "pages" not in response.truth or response.truth.get("kind") == "x" else 1.0

@reward
async def by_tag(response):
    return 1.0 if "<cite>" in response.text else None

@reward(scope=between("<cite>", "</cite>"))
def cites(response):
    return 1.0
"""


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    (tmp_path / "cli_rewards.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "cli_rewards", raising=False)
    importlib.invalidate_caches()
    return tmp_path


def write_rows(path: Path, *rows: dict) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    status = main(arguments)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_scores_scope_and_summary_are_printed(capsys, workdir):
    file = write_rows(
        workdir / "r.jsonl",
        {"text": GOOD, "truth": {"answers": ["16"]}},
        {"id": "b", "text": "<answer>5</answer>", "truth": {"answers": ["16"]}},
        {"text": "x", "truth": {}},
    )
    status, out, _ = run(capsys, "rewards.evisrag:accuracy", file)
    assert status == 0
    assert "--- line 1: 1.0000\n" in out
    assert "</evidence>[[<think>t</think><answer>16</answer>]]\n" in out
    assert "--- b: 0.0000  (scope marker missing)\n<answer>5</answer>\n" in out
    assert "--- line 3: did not apply\nx\n" in out
    assert out.endswith(
        "rewards.evisrag:accuracy on 3 responses\n"
        "  applied         2 of 3\n"
        "  score           mean 0.5000, std 0.7071, 0 to 1\n"
        "  missed marker   1 (void: the reward teaches nothing there)\n"
        "  errors          0\n"
        "note: no response has num_tokens, so rewards of length saw 0 tokens\n"
    )


def test_the_missing_marker_policy_decides_what_is_shown(capsys, workdir):
    file = write_rows(workdir / "r.jsonl", {"text": "<answer>16</answer>", "answer": "16", "num_tokens": 3})
    _, out, _ = run(capsys, "rewards.evisrag:accuracy", file, "--policy", "widen")
    assert "1.0000  (scope marker missing)\n[[<answer>16</answer>]]" in out
    status, out, _ = run(capsys, "rewards.evisrag:accuracy", file, "--policy", "error")
    assert status == 1
    assert "ERROR a scope marker is missing" in out


def test_reference_file_and_limit(capsys):
    status, out, _ = run(capsys, "rewards.evisrag:evidence", GOLDEN, "--limit", "3", "--summary")
    assert status == 0
    assert out.startswith("rewards.evisrag:evidence on 3 responses\n  applied         3 of 3\n")
    # 0.8903, 0, 1 in the file
    assert "mean 0.6301, std 0.5484, 0 to 1" in out
    assert "note:" not in out


def test_arguments_reach_the_reward_and_async_rewards_are_awaited(capsys, workdir):
    file = write_rows(workdir / "r.jsonl", {"text": "<think>x</think>", "page": 2}, {"text": "<think>", "page": 1})
    status, out, _ = run(capsys, "cli_rewards:async_page", file, "--args", '{"page": 2}')
    assert status == 0
    assert "--- line 1: 1.0000\n[[<think>x]]</think>" in out
    assert "--- line 2: 0.0000  (scope marker missing)" in out


def test_an_exception_is_shown_with_the_response_and_counted(capsys, workdir):
    file = write_rows(workdir / "r.jsonl", {"text": "some response"})
    status, out, _ = run(capsys, "cli_rewards:fails", file, "--summary")
    assert status == 1
    assert "--- line 1: ERROR KeyError: 'no such thing' (" in out
    assert 'in fails: raise KeyError("no such thing"))\nsome response\n' in out
    assert "  applied         0 of 1\n  missed marker   0\n  errors          1\n" in out
    status, out, _ = run(capsys, "cli_rewards:not_finite", file)
    assert status == 1
    assert "ERROR RewardError: a score must be finite, got nan" in out


def test_the_same_error_over_many_rows_is_shown_once_and_counted(capsys, workdir):
    file = write_rows(workdir / "r.jsonl", *({"text": f"response {n}"} for n in range(5)))
    status, out, _ = run(capsys, "cli_rewards:fails", file)
    assert status == 1
    assert out.count("ERROR KeyError") == 1
    assert "  errors          5\n    5 x KeyError: 'no such thing' (cli_rewards.py:" in out


def test_a_reward_may_leave_the_program_or_hang_and_is_told_so(capsys, workdir):
    file = write_rows(workdir / "r.jsonl", {"text": "a"})
    _, out, _ = run(capsys, "cli_rewards:leaves", file)
    assert "ERROR it called sys.exit(3) (cli_rewards.py:" in out
    _, out, _ = run(capsys, "cli_rewards:hangs", file, "--timeout", "0.05")
    assert "ERROR took longer than --timeout 0.05 s" in out


@pytest.mark.parametrize("named", ["vals", "vals/rollouts"])
def test_a_run_that_has_only_been_validated_can_be_tried(capsys, workdir, named):
    (workdir / "vals" / "rollouts").mkdir(parents=True)
    rows = [{"prompt_id": "p", "sample": 0, "text": GOOD, "num_tokens": 5, "truth": json.dumps({"answers": ["16"]})}]
    pq.write_table(pa.Table.from_pylist(rows), workdir / "vals" / "rollouts" / "val_000000.parquet")
    status, out, _ = run(capsys, "rewards.evisrag:accuracy", named)
    assert (status, "--- val_000000 p#0: 1.0000" in out) == (0, True)


@pytest.mark.parametrize(
    ("function", "adapter"),
    [("verl_like", "verl"), ("marked_verl", "verl"), ("trl_like", "trl"), ("easy_like", "easyr1")],
)
def test_a_reward_of_another_trainer_gets_the_command_that_works(capsys, workdir, function, adapter):
    file = write_rows(workdir / "r.jsonl", {"text": "16", "answer": "16"})
    status, _, err = run(capsys, f"cli_rewards:{function}", file)
    assert status == 2
    assert f"reward_args.NAME.function=cli_rewards:{function}" in err
    if function != "marked_verl":
        arguments = json.dumps({"function": f"cli_rewards:{function}"})
        assert "mean 1.0000" in run(capsys, f"rewards.adapters:{adapter}", file, "--args", arguments)[1]


def test_credits_are_listed_and_each_span_highlighted(capsys, workdir):
    row = {"text": "<evidence>[1]: 16 [2]: 5</evidence>", "truth": {"evidence": ["16", "7", "8"]}}
    _, out, _ = run(capsys, "rewards.evisrag:evidence_slots", write_rows(workdir / "r.jsonl", row))
    assert "--- line 1: 0.3333  (scope marker missing)\n" in out
    assert "    slot1: 1.0000 on characters 10-18\n" in out
    assert "    slot3: 0.0000 on nothing to teach\n" in out
    assert "<evidence>[[[1]: 16 ]][[[2]: 5]]</evidence>" in out


@pytest.mark.parametrize(
    ("row", "truth"),
    [
        ({"truth": {"answers": ["16"]}}, {"answers": ["16"]}),
        ({"truth": '{"answers": ["16"]}'}, {"answers": ["16"]}),
        ({"answer": "16", "page": 2}, {"answer": "16", "page": 2, "answers": ["16"]}),
        ({"answer": ["16", "17"]}, {"answer": ["16", "17"], "answers": ["16", "17"]}),
        ({"ground_truth": "<answer>a</answer>"}, {"ground_truth": "<answer>a</answer>", "answers": ["a"]}),
        ({"answers": ["16"]}, {"answers": ["16"]}),
    ],
)
def test_every_form_of_truth_is_read(capsys, workdir, row, truth):
    _, out, _ = run(capsys, "cli_rewards:sees", write_rows(workdir / "r.jsonl", {"response": "x", **row}))
    assert out.startswith(f" False () {truth} 0\n")


def write_parquet(path: Path, texts: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    shared = {
        "step": 3, "prompt_id": "p7", "question": "how much?", "images": ["images/a.png", "/data/b.png"],
        "truth": json.dumps({"answers": ["16"], "evidence": ["16"]}), "num_tokens": 12, "truncated": True,
    }  # fmt: skip
    rows = [shared | {"sample": sample, "text": text} for sample, text in enumerate(texts)]
    pq.write_table(pa.Table.from_pylist(rows), path)


@pytest.mark.parametrize("target", ["run/rollouts/step_000003.parquet", "run/rollouts", "run"])
def test_stored_rollouts_are_read_from_a_file_or_a_folder(capsys, workdir, target):
    write_parquet(workdir / "run/rollouts/step_000003.parquet", [GOOD, "cut <ans"])
    status, out, _ = run(capsys, "rewards.evisrag:accuracy", target)
    assert status == 0
    assert "--- step_000003 p7#0: 1.0000\n" in out
    assert "--- step_000003 p7#1: 0.0000  (scope marker missing)\ncut <ans\n" in out
    _, out, _ = run(capsys, "cli_rewards:sees", target)
    images = ("run/images/a.png", "/data/b.png")
    assert out.startswith(f"how much? True {images} {{'answers': ['16'], 'evidence': ['16']}} 12\n")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "x"}\n{"text": "x"\n', "r.jsonl, line 2: Expecting ',' delimiter"),
        ('{"text": "x"}\n\n[1]\n', "line 3: a line must be a JSON object, got list"),
        (
            '{"txt": "x", "id": 1}\n',
            "line 1: the text must be under 'text' or 'response', got the keys txt, id",
        ),
        ('{"text": "x", "num_tokens": "many"}\n', "line 1: num_tokens must be an integer, got 'many'"),
        ('{"text": "x", "truth": "{"}\n', "line 1: Expecting property name"),
        ("", "no responses in"),
    ],
)
def test_a_bad_line_is_named_by_number(capsys, workdir, content, message):
    (workdir / "r.jsonl").write_text(content)
    status, _, err = run(capsys, "rewards.evisrag:well_formed", "r.jsonl")
    assert status == 2
    assert err.startswith("error: ")
    assert message in err


def test_files_that_cannot_be_read_are_named(capsys, workdir):
    (workdir / "empty").mkdir()
    (workdir / "x.parquet").write_text("not parquet")
    pq.write_table(pa.table({"a": [1]}), workdir / "y.parquet")
    (workdir / "z.jsonl").write_bytes(b'{"text": "\xff"}\n')
    for name, message in {
        "none.jsonl": "error: no file or folder none.jsonl\n",
        "empty": "error: no step_*.parquet or val_*.parquet in empty",
        "x.parquet": "error: x.parquet: ",
        "y.parquet": "error: y.parquet: there is no column 'text'",
        "z.jsonl": "error: z.jsonl, line 1: 'utf-8' codec",
    }.items():
        assert run(capsys, "rewards.evisrag:well_formed", name)[2].startswith(message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rewards.evisrag:acuracy", GOLDEN], "did you mean accuracy"),
        (["rewards.evisrag:overlong", GOLDEN, "--args", '{"max_token": 5}'], "did you mean 'max_tokens'"),
        (["rewards.evisrag:overlong", GOLDEN, "--args", "max_tokens=5"], "--args is not JSON"),
        (["rewards.evisrag:overlong", GOLDEN, "--args", "[5]"], "--args must be a JSON object"),
    ],
)
def test_a_reward_that_cannot_be_tried_ends_with_status_2(capsys, arguments, message):
    status, out, err = run(capsys, *arguments)
    assert status == 2
    assert message in err
    assert out == ""


def test_highlighting_uses_colour_on_a_terminal_and_hides_control_characters():
    assert highlight("abcd", [Span(2, 4), Span(0, 1)], colour=False) == "[[a]]b[[cd]]"
    assert highlight("abcd", [Span(1, 2)], colour=True) == "a\x1b[30;42mb\x1b[0mcd"
    assert highlight("a\x1b[2Jb\r\n\té日\u3000", [], colour=False) == "a\\x1b[2Jb\\r\n\té日\u3000"
    assert highlight("abcd", [Span(0, 3), Span(1, 4)], colour=False) == "[[abc]][[d]]"


def test_the_module_runs_as_a_program_from_any_folder(workdir):
    write_rows(workdir / "r.jsonl", {"text": "<think>x</think>", "page": 1})

    def program(*arguments: str) -> str:
        command = [sys.executable, "-m", "rewards", *arguments]
        env = {"PYTHONPATH": str(ROOT), "PATH": ""}
        return subprocess.run(command, stdout=-1, stderr=-2, text=True, check=True, env=env).stdout

    assert program("cli_rewards:async_page", "r.jsonl").startswith("--- line 1: 1.0000\n[[<think>x]]</think>")
    assert "stored rollouts of a run" in program("--help")


@pytest.mark.parametrize(
    ("target", "num_applied", "hint"),
    [
        ("cli_rewards:by_column", 0, "looked for truth['pages'], which is missing; the rows have answers, kind, page"),
        ("cli_rewards:by_tag", 0, "the condition under which it returns None. The responses have the tags </answer>, "),
        (
            "cli_rewards:cites",
            2,
            "found in none of 2 responses, so it would teach nothing: no response has <cite> or </",
        ),
        ("rewards.evisrag:accuracy", 2, None),
    ],
)
def test_only_a_reward_that_teaches_nothing_gets_a_hint_which_says_why(workdir, capsys, target, num_applied, hint):
    row = {"text": GOOD, "truth": {"answers": ["16"], "page": 1, "kind": "a"}}
    status, out, _ = run(capsys, target, write_rows(workdir / "rows.jsonl", row, row), "--summary")
    assert status == 0
    assert f"applied         {num_applied} of 2" in out
    assert out.count("hint: ") == (hint is not None)
    assert hint is None or hint in out
