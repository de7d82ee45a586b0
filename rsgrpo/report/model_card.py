"""Write the README.md of an exported model: its base, data, method, scores and curves.

What a run's files cannot tell (licence, intended use) is left to the publisher, and the card says so.
"""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from rewards.api import RewardError, load_reward
from rsgrpo.config.checks import HUB_ID
from rsgrpo.config.train import PromptConfig
from rsgrpo.data.prompt_file import PROMPT_FILE, SETTINGS_FILE, fingerprint
from rsgrpo.data.prompts import read_template
from rsgrpo.records.tracking import read_metrics
from rsgrpo.report.charts import Curve, collect_curves, split_validation
from rsgrpo.report.line_chart import line_chart
from rsgrpo.report.page import CONFIG_FILE, config_changes, headline, label_of, leading_names, validation_table
from rsgrpo.report.templates import render

CARD_FILE, CURVES_FILE = "README.md", "curves.svg"
MAX_ANCESTORS = 8
MAX_POINTS = 9
NOT_SHOWN = ("name", "output_dir", "cluster.", "tracking.", "learner.num_threads", "rollout.num_threads")


def write_model_card(run_dir: Path, export: Path, settings: Mapping[str, Any]) -> None:
    """Write README.md, curves.svg, training_config.yaml and, if there is a template, prompt.txt into a run's export.

    settings: the run's configuration as plain values.
    """
    shutil.copy(run_dir / CONFIG_FILE, export / SETTINGS_FILE)
    curves = collect_curves(read_metrics(run_dir))
    shown = _headline_curves(curves, leading_names(settings))
    if shown:
        line_chart(export / CURVES_FILE, "held-out scores by training step", "step", *shown, unit="")
    template = read_template(PromptConfig(**settings["prompt"]))
    if template:
        (export / PROMPT_FILE).write_text(template, encoding="utf-8")
    started_from = ancestors(str(settings["model"]["path"]))
    card = model_card(settings, started_from, curves, template=template, has_curves=bool(shown))
    (export / CARD_FILE).write_text(card, encoding="utf-8")


def ancestors(model_path: str) -> list[str]:
    """Return the models that a run started from, nearest first; our exports name theirs in their settings."""
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
    """Return the card as Markdown with the hub's front matter. template: the prompt, "" where rows bring their own."""
    from huggingface_hub import ModelCardData

    data = settings["data"]
    sources = {source.partition(":")[0] for source in (data["train"], data["val"]) if source and _is_hub_id(source)}
    front_matter = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        base_model=started_from[-1] if _is_hub_id(started_from[-1]) else None,
        datasets=sorted(sources) or None,
        tags=["rsgrpo"],
    )
    method = "supervised fine-tuning"
    if "algorithm" in settings:
        method = method_of(settings["algorithm"])
    return render(
        "card.md",
        front_matter=front_matter.to_yaml(),
        settings=settings,
        method=method,
        started_from=started_from,
        rewards=[(name, target, _meaning(target)) for name, target in (settings.get("rewards") or {}).items()],
        table=validation_table(curves, leading_names(settings)),
        curves_file=CURVES_FILE if has_curves else "",
        protocol=protocol_of(settings, template),
        template=template,
        prompt_file=PROMPT_FILE,
        changes=[change for change in config_changes(settings) if not change[0].startswith(NOT_SHOWN)],
        settings_file=SETTINGS_FILE,
    )


def protocol_of(settings: Mapping[str, Any], template: str) -> str:
    """Return what the scores depend on: prompt, pages, pixels and decoding."""
    validation, inputs = settings["validation"], settings["inputs"]
    kinds = ["greedy"] if validation["greedy"] else []
    if validation["samples"]:
        sampled = f"{validation['samples']} sampled at temperature {validation['temperature']:g}"
        kinds.append(f"{sampled}, top-p {validation['top_p']:g}")
    prompt = fingerprint(PromptConfig(template=template, system=settings["prompt"]["system"]))
    return (
        f"Scored by the run's own rewards; responses: {' and '.join(kinds) or 'none'}; prompt hash {prompt}; at most "
        f"{inputs['max_images']} pages of {inputs['min_pixels']:,} to {inputs['max_pixels']:,} pixels."
    )


def method_of(algorithm: Mapping[str, Any]) -> str:
    """Return what a card calls the method: its kind of advantage and, where rewards have scopes, its credit rule."""
    kind = algorithm["advantage"]
    if kind in ("per_reward", "per_scope"):
        return f"reward-scoped GRPO (`{kind}`, credit `{algorithm.get('credit', 'own')}`)"
    return f"GRPO with one advantage for the whole response (`{kind}`)"


def _is_hub_id(name: str) -> bool:
    return HUB_ID.fullmatch(name) is not None and not Path(name.partition(":")[0]).exists()


def _meaning(target: str) -> str:
    """Return the first sentence of a reward's documentation; "" if it has none or cannot be imported here."""
    try:
        return (inspect.getdoc(load_reward(target)) or "").partition("\n")[0]
    except RewardError:
        return ""


def _headline_curves(
    curves: dict[str, Curve], leading: Sequence[str]
) -> tuple[list[int], dict[str, list[float]]] | None:
    """Return the steps of validation and its leading scores, at most `MAX_POINTS`; None without a second validation."""
    labels = {change.label for change in headline(curves, leading) if not change.lower_is_better}
    found = {
        label_of(key): dict(curve) for key, curve in curves.items() if split_validation(key) and label_of(key) in labels
    }
    steps = sorted(set.intersection(*(set(curve) for curve in found.values()))) if found else []
    if len(steps) < 2:
        return None
    stride = -(-(len(steps) - 1) // (MAX_POINTS - 1))
    steps = [*steps[:-1:stride], steps[-1]]
    return steps, {name: [curve[step] for step in steps] for name, curve in found.items()}
