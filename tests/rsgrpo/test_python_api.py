"""The documented loop without Ray and hydra, run as it is written."""

from __future__ import annotations

import json
import re
import runpy

import rsgrpo
from tests.material import ROOT

DOCS = ROOT / "docs" / "reference"


def test_every_public_name_can_be_imported():
    for name in rsgrpo.__all__:
        assert getattr(rsgrpo, name) is not None


def test_the_page_of_the_api_is_made_from_the_docstrings():
    made = runpy.run_path(str(ROOT / "tools" / "api_reference.py"))["document"]()
    assert (DOCS / "api.md").read_text(encoding="utf-8") == made, "run: python tools/api_reference.py"
    for name in set(rsgrpo.__all__) - {"__version__"}:
        assert f"\n### {name}\n" in made


def test_the_loop_of_the_documentation_runs(tmp_path, tiny_model_path, page_images, capsys):
    rows = tmp_path / "train.jsonl"
    rows.write_text(
        "".join(
            json.dumps(
                {
                    "id": str(i),
                    "prompt": "<image><image>what amount is on page 1?",
                    "answer": "<evidence>\n[1]: 7\n[2]: no relevant information\n</evidence>\n<answer>7</answer>",
                    "image": page_images[:2],
                }
            )
            + "\n"
            for i in range(4)
        )
    )
    [code] = re.findall(r"```python\n(.*?)```", (DOCS / "python_api.md").read_text(), re.DOTALL)
    code = code.replace("demo/sft/export", tiny_model_path).replace("demo/data/train.jsonl", str(rows))
    exec(compile(code, "docs/reference/python_api.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if "actor/" in line] == ["1", "2"]
