"""The README.md of an exported model: what it was made from, how, what it scores and how it got there.

Reads a run folder and writes into its export. What it cannot know (licence, intended use) it leaves to a person, and
says so.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from rsgrpo.config.checks import HUB_ID
from rsgrpo.config.train import PromptConfig
from rsgrpo.data.prompts import read_template
from rsgrpo.records.tracking import read_metrics
from rsgrpo.report.charts import Curve, collect_curves, split_validation
from rsgrpo.report.line_chart import line_chart
from rsgrpo.report.page import CONFIG_FILE, config_changes, headline, validation_table

CARD_FILE, CURVES_FILE, SETTINGS_FILE, PROMPT_FILE = "README.md", "curves.svg", "training_config.yaml", "prompt.txt"
MAX_ANCESTORS = 8
MAX_POINTS = 9
NOT_SHOWN = ("name", "output_dir", "cluster.", "tracking.", "learner.num_threads", "rollout.num_threads")


def write_model_card(run_dir: Path, export: Path, settings: Mapping[str, Any]) -> None:
    """Write README.md, curves.svg, training_config.yaml and, if there is a template, prompt.txt into a run's export.

    settings: the run's configuration as plain values.
    """
    shutil.copy(run_dir / CONFIG_FILE, export / SETTINGS_FILE)
    curves = collect_curves(read_metrics(run_dir))
    shown = _headline_curves(curves)
    if shown:
        steps, series = shown
        line_chart(export / CURVES_FILE, "held-out scores by training step", "step", steps, series, unit="")
    template = read_template(PromptConfig(**settings["prompt"]))
    if template:
        (export / PROMPT_FILE).write_text(template, encoding="utf-8")
    started_from = ancestors(str(settings["model"]["path"]))
    card = model_card(settings, started_from, curves, template=template, has_curves=bool(shown))
    (export / CARD_FILE).write_text(card, encoding="utf-8")


def ancestors(model_path: str) -> list[str]:
    """Return the models a run started from, the nearest first: exports of ours name theirs, up to a model of others."""
    found = [model_path]
    while len(found) < MAX_ANCESTORS and (settings := Path(found[-1]) / SETTINGS_FILE).is_file():
        found.append(str(yaml.safe_load(settings.read_text(encoding="utf-8"))["model"]["path"]))
    return found


def model_card(
    settings: Mapping[str, Any],
    started_from: Sequence[str],
    curves: dict[str, Curve],
    *,
    template: str = "",
    has_curves: bool = False,
) -> str:
    """Return the card as markdown with the hub's front matter. template: the prompt, "" where rows bring their own."""
    data = settings["data"]
    trained_by = "algorithm" in settings
    method = f"reward-scoped GRPO (`{settings['algorithm']['advantage']}`)" if trained_by else "supervised fine-tuning"
    lines = [
        "---",
        yaml.safe_dump(_front_matter(started_from, [data["train"], data["val"]]), sort_keys=False).rstrip(),
        "---",
        f"# {settings['name']}",
        "",
        f"A vision-language model trained by {method} with [rsgrpo](https://arxiv.org/abs/2510.09733), to answer "
        "questions over several page images with evidence: it writes `<observe>`, `<evidence>` (one slot for each "
        "page), `<think>` and `<answer>`.",
        "",
        "| | |",
        "|---|---|",
        f"| started from | {' ← '.join(f'`{name}`' for name in started_from)} |",
        f"| trained on | `{data['train']}` |",
        f"| validated on | {'`' + data['val'] + '`' if data['val'] else 'nothing'} |",
    ]
    if trained_by:
        lines.append(f"| rewards | {', '.join(f'`{name}`' for name in settings['rewards'])} |")
    inputs = settings["inputs"]
    lines.append(
        f"| page area | {inputs['min_pixels']:,} to {inputs['max_pixels']:,} pixels, as the processor has it |"
    )
    lines += ["", "## Scores on held-out rows", "", *_score_table(curves)]
    if has_curves:
        lines += ["", f"![Held-out scores by training step]({CURVES_FILE})"]
    lines += ["", "## Use", "", *_usage(template)]
    changes = [change for change in config_changes(dict(settings)) if not change[0].startswith(NOT_SHOWN)]
    lines += ["", "## Settings", "", f"Those that are not rsgrpo's defaults; all of them are in `{SETTINGS_FILE}`.", ""]
    lines += ["| key | value |", "|---|---|", *(f"| `{key}` | {_cell(value)} |" for key, value, _ in changes)]
    lines += [
        "",
        "## To be written by whoever publishes it",
        "",
        "Licence, intended use and limits: this card was made from the run's files, which do not know them.",
    ]
    return "\n".join(lines) + "\n"


def _front_matter(started_from: Sequence[str], sources: Sequence[str]) -> dict[str, Any]:
    """Return what the hub indexes; only names that the hub has may stand there."""
    front: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "image-text-to-text"}
    if _is_hub_id(started_from[-1]):
        front["base_model"] = started_from[-1]
    datasets = sorted({source.partition(":")[0] for source in sources if source and _is_hub_id(source)})
    if datasets:
        front["datasets"] = datasets
    return front | {"tags": ["rsgrpo", "evidence", "document-question-answering"]}


def _is_hub_id(name: str) -> bool:
    return HUB_ID.fullmatch(name) is not None and not Path(name.partition(":")[0]).exists()


def _headline_curves(curves: dict[str, Curve]) -> tuple[list[int], dict[str, list[float]]] | None:
    """Return the steps of validation and its leading scores, at most `MAX_POINTS`; None without a second validation."""
    labels = {change.label for change in headline(curves)}
    found = {
        f"{name}, {mode}" if mode else f"{name}, validation": dict(curve)
        for key, curve in curves.items()
        if (place := split_validation(key))
        for mode, name in [place]
        if (f"{name}, {mode}" if mode else f"{name}, validation") in labels and name != "loss"
    }
    steps = sorted(set.intersection(*(set(curve) for curve in found.values()))) if found else []
    if len(steps) < 2:
        return None
    stride = -(-(len(steps) - 1) // (MAX_POINTS - 1))
    steps = [*steps[:-1:stride], steps[-1]]
    return steps, {name: [curve[step] for step in steps] for name, curve in found.items()}


def _score_table(curves: dict[str, Curve]) -> list[str]:
    """Return first and last value of every validation score."""
    table = validation_table(curves)
    if not table["rows"]:
        return ["The run had no validation."]
    head = ["score", *(mode or "validation" for mode in table["modes"])]
    rows = [
        [row["name"], *("" if cell is None else f"{cell[0]:.3f} → {cell[1]:.3f}" for cell in row["cells"])]
        for row in table["rows"]
    ]
    lines = ["Before → after training.", "", "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def _usage(template: str) -> list[str]:
    option = f" --prompt {PROMPT_FILE}" if template else ""
    lines = [
        f'    python -m recipes.infer "What was the revenue?" --image p1.png p2.png --model THIS_FOLDER{option}',
        "",
        "or any program that loads `AutoModelForImageTextToText` and `AutoProcessor`; it runs no code of its own.",
    ]
    if template:
        lines += ["", f"It was trained with the prompt in `{PROMPT_FILE}`:", ""]
        return lines + [f"    {row}" for row in template.split("\n")]
    return [*lines, "", "The rows of training brought their own messages; ask in the same words."]


def _cell(value: str) -> str:
    return value.replace("|", "\\|").replace("\n", " ")
