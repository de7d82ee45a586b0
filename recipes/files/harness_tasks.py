"""Write questions as a task of lmms-eval (a folder for its `--include_path`) and as a table for VLMEvalKit.

The model is sent what our own programs would send it: the message of a prompt, with the pages as they are decoded here.
"""

from __future__ import annotations

import base64
import csv
import io
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import yaml

from recipes.answers.questions import IMAGE_MARK, Question, prompt_hash, to_prompt
from rollout.files import write_bytes, write_text
from rollout.inputs.images import decode
from rollout.types import ImageSource, Prompt
from rsgrpo.config.train import PromptConfig
from rsgrpo.data.prompts import read_template
from rsgrpo.errors import InputError

UTILS = "utils.py"


@dataclass(frozen=True, slots=True)
class HarnessFiles:
    """What was written. task: its name in lmms-eval. folder: for `--include_path`. table: the .tsv for VLMEvalKit."""

    task: str
    folder: Path
    table: Path


def write_harness_tasks(
    questions: Sequence[Question],
    prompt: PromptConfig,
    out: Path,
    *,
    name: str,
    max_tokens: int,
    advance: Callable[[], None] = lambda: None,
) -> HarnessFiles:
    """Write both. Pages are stored as PNG beside the task, and inside the table.

    name: of the data set; the task is `rsgrpo_NAME`. max_tokens: longest answer, which lmms-eval asks for.

    Raises:
        InputError: there is no question, one has no gold answer, or a message cannot be made.
    """
    without = [question.id for question in questions if not question.answers]
    if not questions or without:
        raise InputError(
            f"{len(without)} questions have no gold answer, such as {without[:1]}: both harnesses need one"
        )
    task = "rsgrpo_" + re.sub(r"\W+", "_", name)
    folder = out / "lmms_eval" / task
    (folder / "images").mkdir(parents=True, exist_ok=True)
    template = read_template(prompt)
    rows, cells = [], []
    for number, question in enumerate(questions):
        asked = to_prompt(question, template, prompt.system)
        pages = [_png(source) for source in asked.images]
        names = [f"images/{number:06d}-{place}.png" for place in range(1, len(pages) + 1)]
        for path, content in zip(names, pages, strict=True):
            write_bytes(folder / path, content)
        rows.append(_row(question, asked, names))
        cells.append(_cells(number, question, asked, pages))
        advance()
    write_text(folder / "rows.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    write_text(folder / UTILS, resources.files("recipes.files").joinpath("assets/lmms_utils.py").read_text("utf-8"))
    facts = {"version": 1.0, "prompt": prompt_hash(Prompt("", template or "raw", system=prompt.system))}
    write_text(folder / f"{task}.yaml", _task_yaml(task, folder / "rows.jsonl", max_tokens, facts))
    return HarnessFiles(task, out / "lmms_eval", _write_table(out / "vlmevalkit" / f"{task}.tsv", cells))


def _row(question: Question, asked: Prompt, images: Sequence[str]) -> dict[str, object]:
    return {
        "id": question.id,
        "question": question.question,
        "answers": list(question.answers),
        "text": asked.text,
        "system": asked.system,
        "images": list(images),
    }


def _cells(number: int, question: Question, asked: Prompt, pages: Sequence[bytes]) -> dict[str, str]:
    """Return a row of the table: a page in base64, several as a list of them with a name for each."""
    encoded = [base64.b64encode(page).decode() for page in pages]
    names = [f"{number:06d}-{place}.png" for place in range(1, len(pages) + 1)]
    is_list = len(pages) != 1
    return {
        "index": str(number),
        "id": question.id,
        "image": repr(encoded) if is_list else encoded[0],
        "image_path": repr(names) if is_list else names[0],
        "question": asked.text.replace(IMAGE_MARK, ""),
        "answer": question.answers[0],
    }


def _task_yaml(task: str, rows: Path, max_tokens: int, facts: dict[str, object]) -> str:
    settings = {
        "task": task,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(rows.absolute())}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_visual": "FUNCTION doc_to_visual",
        "doc_to_text": "FUNCTION doc_to_text",
        "doc_to_messages": "FUNCTION doc_to_messages",
        "doc_to_target": "answers",
        "process_results": "FUNCTION process_results",
        "reasoning_tags": "none",  # else it cuts <think> out of the answers that it logs
        "generation_kwargs": {"max_new_tokens": max_tokens, "temperature": 0, "do_sample": False},
        "metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("em", "f1")],
        "metadata": facts,
    }
    text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    return text.replace("FUNCTION ", "!function utils.")


def _write_table(path: Path, cells: Sequence[dict[str, str]]) -> Path:
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, list(cells[0]), dialect="excel-tab", lineterminator="\n")
    table.writeheader()
    table.writerows(cells)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text.getvalue())
    return path


def _png(source: ImageSource) -> bytes:
    content = io.BytesIO()
    decode(source).save(content, "PNG")
    return content.getvalue()
