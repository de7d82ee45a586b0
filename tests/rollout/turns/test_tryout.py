"""The offline tryout: a policy's turns by hand, an environment's answers on the screen."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import pytest

from rollout.turns.__main__ import main

HERE = "tests.material.environments"


def test_it_shows_text_images_facts_and_the_end(capsys, page_images, tiny_model_path):
    arguments = f'{{"pages": ["{page_images[0]}"], "most": 1}}'
    turns = ["--turn", "page one", "--turn", "again", "--turn", "never asked"]
    code = main([f"{HERE}:Pages", "--arguments", arguments, "--model", tiny_model_path, *turns])
    said = capsys.readouterr().out
    assert code == 0
    assert "A turn ends at end-of-text." in said
    assert "[turn 1] page one" in said
    assert "facts: {" in said
    assert "tokens: " in said
    assert "[turn 2] again\n  the episode ends" in said
    assert "never asked" not in said


def test_the_environment_of_the_guide_runs_as_it_is_printed(capsys, monkeypatch, tmp_path, page_images):
    guide = (Path(__file__).parents[3] / "docs/howto/environments.md").read_text()
    code = guide.partition("```python\n")[2].partition("```")[0]
    assert len(code.splitlines()) <= 30
    (tmp_path / "my_tools.py").write_text(code)
    (tmp_path / "pages").mkdir()
    shutil.copy(page_images[0], tmp_path / "pages/3.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    turns = ["--turn", "<open>9</open>", "--turn", "<open>3</open>", "--turn", "It is 7."]
    assert main(["my_tools:Pages", "--arguments", '{"folder": "pages"}', *turns]) == 0
    said = capsys.readouterr().out
    assert "There is no page '9'.\n  fault: bad_call" in said
    assert "Page 3: <image>\n  image 1: " in said
    assert "[turn 3] It is 7.\n  the episode ends" in said


def test_turns_come_from_a_file_or_the_keyboard(capsys, monkeypatch, tmp_path):
    (tmp_path / "turns.txt").write_text("first\nline two\n---\nsecond\n")
    assert main([f"{HERE}:Slow", "--script", str(tmp_path / "turns.txt"), "--timeout-s", "0.2"]) == 1
    said = capsys.readouterr().out
    assert "[turn 1] first\nline two\n  here" in said
    assert "[turn 2] second\n  No answer within 0.2 s.\n  fault: timeout" in said
    monkeypatch.setattr("sys.stdin", io.StringIO("typed\n"))
    assert main([f"{HERE}:Slow"]) == 0
    assert "[turn 1] typed" in capsys.readouterr().out


def test_what_the_environment_raises_is_shown_with_its_place(capsys, caplog):
    assert main([f"{HERE}:Faulty", "--turn", "x", "--turn", "y"]) == 1
    assert "It failed: ValueError: no such page" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nothing"], "is written module:Class"),
        ([f"{HERE}:Pages"], "does not take (prompt, **rollout.turns.arguments)"),
        ([f"{HERE}:Pages", "--arguments", "["], "--arguments is not JSON"),
        ([f"{HERE}:Pages", "--arguments", "[]"], "--arguments must be a JSON object"),
    ],
)
def test_wrong_arguments_are_one_line(capsys, arguments, said):
    assert main(arguments) == 2
    assert said in capsys.readouterr().err


def test_tools_print_their_descriptions_for_the_prompt(capsys):
    arguments = '{"functions": ["tests.rollout.turns.test_tools:search"]}'
    assert main(["rollout.turns.tools:Tools", "--arguments", arguments, "--schemas"]) == 0
    assert '"name": "search"' in capsys.readouterr().out
