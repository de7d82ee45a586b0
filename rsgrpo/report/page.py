"""Write the report of a run: one self-contained HTML page from the contents of its folder.

    python -m rsgrpo.report RUN [--out report.html] [--step N] [--max-groups 8]

Everything in a rollout reaches the page as JSON and is shown as text only; the page's content policy allows its own
script and nothing from outside.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from markupsafe import Markup

from rewards.api import RewardError, load_reward
from rollout.errors import one_line
from rollout.files import write_text
from rollout.inputs.images import PromptError, data_uri
from rsgrpo.config.train import SftConfig, TrainConfig
from rsgrpo.errors import InputError, run_program
from rsgrpo.records.rollouts import RolloutsDamaged, StoredRollout, read_rollouts, rollout_files
from rsgrpo.records.tracking import METRICS_FILE, read_metrics
from rsgrpo.report.charts import Curve, build_charts, collect_curves, split_validation
from rsgrpo.report.several import read_scores, table
from rsgrpo.report.templates import asset, json_for_script, render, script_hash

log = logging.getLogger(__name__)

CONFIG_FILE = "config.yaml"
REPORT_FILE = "report.html"
MAX_GROUPS = 8
MAX_HEADLINE = 4
MAX_IMAGE_SIDE = 1000


@dataclass(frozen=True, slots=True)
class Change:
    """A headline number before and after training."""

    label: str
    before: float
    after: float
    lower_is_better: bool


def write_report(
    run_dir: str | Path, out: str | Path | None = None, *, step: int | None = None, max_groups: int = MAX_GROUPS
) -> Path:
    """Write the report of a run, finished or not, and return the file (`<run>/report.html` unless `out` is given).

    step: the one training step whose rollouts are shown; None shows the first, a middle and the last stored step.
    max_groups: groups shown of a step, those with a signal first.

    Raises:
        InputError: the folder is not a run folder, or has no rollouts of `step`.
    """
    run_dir = Path(run_dir)
    if not (run_dir / METRICS_FILE).exists() and not (run_dir / CONFIG_FILE).exists():
        raise InputError(f"{run_dir} is not a run folder (no {METRICS_FILE} or {CONFIG_FILE})")
    out = Path(out) if out else run_dir / REPORT_FILE
    write_text(out, render_page(collect_report(run_dir, step=step, max_groups=max_groups)))
    return out


def collect_report(run_dir: Path, *, step: int | None = None, max_groups: int = MAX_GROUPS) -> dict[str, Any]:
    """Return everything that the page shows, as JSON-ready values."""
    lines = read_metrics(run_dir)
    curves = collect_curves(lines)
    config = _load_config(run_dir)
    leading = leading_names(config)
    images: dict[str, str | None] = {}
    return {
        "name": config.get("name") or run_dir.resolve().name,
        "generated": time.strftime("%d %B %Y, %H:%M UTC", time.gmtime()),
        "facts": _facts(lines, curves),
        "headline": [asdict(change) for change in headline(curves, leading)],
        "table": validation_table(curves, leading),
        "charts": build_charts(curves),
        "weights": config.get("reward_weights") or {},
        "config": config_changes(config),
        "config_text": yaml.safe_dump(config, sort_keys=False) if config else "",
        "views": _views(run_dir, _chosen_files(run_dir, step), images, max_groups),
        "images": images,
    }


def render_page(payload: dict[str, Any]) -> str:
    """Return the HTML page with its style, script and data inside."""
    script = asset("charts.js") + asset("rollouts.js")
    return render(
        "page.html",
        title="RS-GRPO run report",
        brand="RS-GRPO run report",
        script=Markup(script),
        script_hash=script_hash(script),
        data=json_for_script(payload),
    )


def leading_names(config: Mapping[str, Any]) -> list[str]:
    """Return a run's rewards and monitors that declare themselves `leading`, the loss last.

    A function that cannot be imported here counts as not leading.
    """
    found = []
    for name, target in {**(config.get("rewards") or {}), **(config.get("monitors") or {})}.items():
        try:
            found += [name] if load_reward(str(target)).leading else []
        except RewardError as error:
            log.info("the report does not know whether %s is a leading reward: %s", name, error)
    return [*found, "loss"]


def headline(curves: dict[str, Curve], leading: Sequence[str]) -> list[Change]:
    """Return the first and last value of the leading validation scores; without any, of the training rewards.

    leading: names whose scores are shown, the most important first; if no validation has one of them, all are.
    A training reward is noisy: its first and last tenth of the run are averaged.
    """
    places = {key: place for key in curves if (place := split_validation(key)) and place[1] != "num_tokens"}
    found = {key: place for key, place in places.items() if place[1] in leading} or places
    changes = []
    for key, (_, name) in sorted(found.items(), key=lambda item: (_rank(item[1][1], leading), item[1][0] != "sampled")):
        changes.append(Change(label_of(key), curves[key][0][1], curves[key][-1][1], name == "loss"))
    if not changes:
        means = [key for key in curves if key.startswith("reward/") and key.endswith("/mean")]
        for key in sorted(means, key=lambda key: _rank(key.split("/")[1], leading)):
            values = [value for _, value in curves[key]]
            tenth = max(1, len(values) // 10)
            first, last = sum(values[:tenth]) / tenth, sum(values[-tenth:]) / tenth
            changes.append(Change(f"{key.split('/')[1]}, training", first, last, lower_is_better=False))
    return changes[:MAX_HEADLINE]


def label_of(key: str) -> str:
    """Return a validation score's label; "val/greedy/accuracy" -> "accuracy, greedy"."""
    mode, name = split_validation(key) or ("", key)
    return f"{name}, {mode or 'validation'}"


def validation_table(curves: dict[str, Curve], leading: Sequence[str]) -> dict[str, Any]:
    """Return every validation score as {"modes", "rows": [{"name", "cells"}]}; a cell is [before, after] or None."""
    ends = {place: [curve[0][1], curve[-1][1]] for key, curve in curves.items() if (place := split_validation(key))}
    modes = sorted({mode for mode, _ in ends}, reverse=True)
    names = sorted({name for _, name in ends}, key=lambda name: (_rank(name, leading), name))
    return {
        "modes": modes,
        "rows": [{"name": name, "cells": [ends.get((mode, name)) for mode in modes]} for name in names],
    }


def config_changes(config: Mapping[str, Any]) -> list[list[str]]:
    """Return [key, value, default] of every setting that differs from its default."""
    if not config:
        return []
    defaults = _flatten(json.loads(json.dumps(asdict(TrainConfig() if "algorithm" in config else SftConfig()))))
    return [
        [key, _show(value), _show(defaults[key]) if key in defaults else ""]
        for key, value in _flatten(config).items()
        if value != defaults.get(key)
    ]


def _facts(lines: Sequence[dict[str, Any]], curves: dict[str, Curve]) -> list[list[str]]:
    facts = [["steps", str(max((line["step"] for line in lines), default=0))]]
    if len(lines) > 1:
        facts.append(["from first to last line", _duration(lines[-1]["time"] - lines[0]["time"])])
    if "time/step" in curves:
        seconds = sorted(value for _, value in curves["time/step"])
        facts.append(["median step", f"{seconds[len(seconds) // 2]:.1f} s"])
    if "rollout/num_tokens_mean" in curves:
        facts.append(["tokens per response, last step", f"{curves['rollout/num_tokens_mean'][-1][1]:.0f}"])
    return facts


def _load_config(run_dir: Path) -> dict[str, Any]:
    path = run_dir / CONFIG_FILE
    if not path.exists():
        return {}
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        log.warning("%s is damaged, so the report has no configuration: %s", path, one_line(error))
        return {}
    return found if isinstance(found, dict) else {}


def _chosen_files(run_dir: Path, step: int | None) -> list[Path]:
    """Return the first, a middle and the last training file, or the one of `step`, and the last validation's."""
    train, val = rollout_files(run_dir, "train"), rollout_files(run_dir, "val")
    if step is not None:
        if step not in train and step not in val:
            stored = ", ".join(map(str, train)) or "none"
            raise InputError(f"no rollouts of step {step} in {run_dir}; stored steps: {stored}")
        return [files[step] for files in (train, val) if step in files]
    steps = list(train)
    chosen = sorted({0, len(steps) // 2, len(steps) - 1}) if steps else []
    return [train[steps[index]] for index in chosen] + list(val.values())[-1:]


def _views(
    run_dir: Path, paths: Sequence[Path], images: dict[str, str | None], max_groups: int
) -> list[dict[str, Any]]:
    """Return what the page shows of each rollout file that can be read."""
    views = []
    for path in paths:
        try:
            views.append(_view(run_dir, path, images, max_groups))
        except RolloutsDamaged as error:
            log.warning("left out of the report: %s", error)
    return views


def _view(run_dir: Path, path: Path, images: dict[str, str | None], max_groups: int) -> dict[str, Any]:
    """Return what the page shows of one rollout file."""
    groups: dict[tuple[str, int], list[StoredRollout]] = {}
    for rollout in read_rollouts(path):
        groups.setdefault((rollout.mode, rollout.group), []).append(rollout)
    ordered = sorted(groups.values(), key=lambda group: not _has_signal(group))[:max_groups]
    first = ordered[0][0] if ordered else None
    for group in ordered:
        read = [str(image) for rollout in group for o in rollout.observations for image in o.images]
        for image in (*group[0].images, *read):
            if image not in images:
                images[image] = _data_uri(run_dir / image)
    return {
        "step": first.step if first else int(path.stem.split("_")[1]),
        "split": first.split if first else "train",
        "num_groups": len(groups),
        "terms": list(first.terms) if first else [],
        "groups": [_group(group) for group in ordered],
    }


def _group(group: Sequence[StoredRollout]) -> dict[str, Any]:
    first = group[0]
    return {
        "id": first.prompt_id,
        "mode": first.mode,
        "question": first.question or first.prompt_text,
        "images": list(first.images),
        "truth": first.truth,
        "rollouts": [_rollout(rollout) for rollout in group],
    }


def _rollout(rollout: StoredRollout) -> dict[str, Any]:
    return {
        "text": rollout.text,
        "ids": rollout.token_ids_T,
        "starts": [start for start, _ in rollout.token_spans_T],
        "ends": [end for _, end in rollout.token_spans_T],
        "logprobs": [round(logprob, 4) for logprob in rollout.rollout_logprobs_T],
        "truncated": rollout.truncated,
        "version": rollout.weights_version,
        "rewards": [{"name": r.name, "score": r.score, "missed": r.missed} for r in rollout.rewards],
        "monitors": list(rollout.monitors.items()),
        "terms": [[[run.start, run.end, round(run.advantage, 4)] for run in runs] for runs in rollout.terms.values()],
        "observations": [
            {"at": o.at, "text": o.text, "images": list(o.images), "facts": dict(o.facts), "fault": o.fault}
            | {"tokens": len(o.token_ids_S)}
            for o in rollout.observations
        ],
    }


def _has_signal(group: Sequence[StoredRollout]) -> bool:
    return any(run.advantage != 0 for rollout in group for runs in rollout.terms.values() for run in runs)


def _data_uri(path: Path) -> str | None:
    """Return an image at screen size; None if the file is gone or is no longer an image."""
    try:
        return data_uri(str(path), MAX_IMAGE_SIDE)
    except PromptError:
        return None


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _show(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _rank(name: str, leading: Sequence[str]) -> int:
    stem = name.split("/")[0]
    return leading.index(stem) if stem in leading else len(leading)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m rsgrpo.report", description="Write a run's report as one HTML page."
    )
    parser.add_argument("run", nargs="+", help="run folder, e.g. runs/demo; of several, a table of their last scores")
    parser.add_argument("--out", help=f"file to write (default: RUN/{REPORT_FILE})")
    parser.add_argument("--step", type=int, help="show the rollouts of this step only")
    parser.add_argument(
        "--max-groups", type=int, default=MAX_GROUPS, help="groups shown per step (default: %(default)s)"
    )
    options = parser.parse_args(argv)

    def work() -> None:
        if len(options.run) > 1:
            print(table([read_scores(Path(run)) for run in options.run]))
            return
        print(write_report(options.run[0], options.out, step=options.step, max_groups=options.max_groups))

    return run_program(work)
