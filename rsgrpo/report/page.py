"""Own the report: turn a run folder into one self-contained HTML page. Knows what is on disk, nothing of training.

    python -m rsgrpo.report RUN [--out report.html] [--step N] [--max-groups 8]

Everything that a rollout says reaches the page as JSON and is shown as text only; the page's content policy allows its
own script and nothing from outside.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from PIL import Image, ImageOps

from rsgrpo.config.train import SftConfig, TrainConfig
from rsgrpo.errors import InputError, RsgrpoError
from rsgrpo.records.rollouts import StoredRollout, image_path, read_rollouts, rollout_files
from rsgrpo.records.tracking import METRICS_FILE, read_metrics
from rsgrpo.report.charts import Curve, build_charts, collect_curves, split_validation

CONFIG_FILE = "config.yaml"
REPORT_FILE = "report.html"
MAX_GROUPS = 8
MAX_IMAGE_SIDE = 1000
LEADING_METRICS = ("accuracy", "evidence", "well_formed", "f1", "loss")


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
        InputError: the folder holds no run, or no rollouts of `step`.
    """
    run_dir = Path(run_dir)
    if not (run_dir / METRICS_FILE).exists() and not (run_dir / CONFIG_FILE).exists():
        raise InputError(f"{run_dir} is no run folder: it has neither {METRICS_FILE} nor {CONFIG_FILE}")
    out = Path(out) if out else run_dir / REPORT_FILE
    page = render_page(collect_report(run_dir, step=step, max_groups=max_groups))
    temporary = out.with_name(f".{out.name}.tmp")
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(out)
    return out


def collect_report(run_dir: Path, *, step: int | None = None, max_groups: int = MAX_GROUPS) -> dict[str, Any]:
    """Return all that the page shows, as JSON-ready values."""
    lines = read_metrics(run_dir)
    curves = collect_curves(lines)
    config = _load_config(run_dir)
    images: dict[str, str | None] = {}
    return {
        "name": config.get("name") or run_dir.resolve().name,
        "generated": time.strftime("%d %B %Y, %H:%M UTC", time.gmtime()),
        "facts": _facts(lines, curves),
        "headline": [asdict(change) for change in headline(curves)],
        "table": validation_table(curves),
        "charts": build_charts(curves),
        "weights": config.get("reward_weights") or {},
        "config": config_changes(config),
        "config_text": yaml.safe_dump(config, sort_keys=False) if config else "",
        "views": [_view(run_dir, path, images, max_groups) for path in _chosen_files(run_dir, step)],
        "images": images,
    }


def render_page(payload: dict[str, Any]) -> str:
    """Return the HTML page with its style, script and data inside."""
    assets = {
        name: resources.files("rsgrpo").joinpath("report", "assets", name).read_text(encoding="utf-8")
        for name in ("page.html", "style.css", "charts.js", "rollouts.js")
    }
    script = assets["charts.js"] + assets["rollouts.js"]
    script_hash = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    data = json.dumps(_json_ready(payload), allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        data = data.replace(character, f"\\u{ord(character):04x}")
    page = assets["page.html"].replace("{{script_hash}}", script_hash).replace("{{style}}", assets["style.css"])
    return page.replace("{{script}}", script).replace("{{data}}", data)


def headline(curves: dict[str, Curve], limit: int = 4) -> list[Change]:
    """Return the first and last value of the leading validation scores; without any, of the training rewards.

    A training reward is noisy: its first and last tenth of the run are averaged.
    """
    found = {key: place for key in curves if (place := split_validation(key)) and place[1] in LEADING_METRICS}
    changes = []
    for key, (mode, name) in sorted(found.items(), key=lambda item: (_rank(item[1][1]), item[1][0] != "sampled")):
        label = f"{name}, {mode}" if mode else f"{name}, validation"
        changes.append(Change(label, curves[key][0][1], curves[key][-1][1], _lower_is_better(name)))
    if changes:
        return changes[:limit]
    keys = [key for key in curves if key.startswith("reward/") and key.endswith("/mean")]
    for key in sorted(keys, key=lambda key: _rank(key.split("/")[1])):
        values = [value for _, value in curves[key]]
        tenth = max(1, len(values) // 10)
        first, last = sum(values[:tenth]) / tenth, sum(values[-tenth:]) / tenth
        changes.append(Change(f"{key.split('/')[1]}, training", first, last, lower_is_better=False))
    return changes[:limit]


def validation_table(curves: dict[str, Curve]) -> dict[str, Any]:
    """Return every validation score as {"modes", "rows": [{"name", "cells"}]}; a cell is [before, after] or None."""
    ends = {place: [curve[0][1], curve[-1][1]] for key, curve in curves.items() if (place := split_validation(key))}
    modes = sorted({mode for mode, _ in ends}, reverse=True)
    names = sorted({name for _, name in ends}, key=lambda name: (_rank(name), name))
    rows = [{"name": name, "cells": [ends.get((mode, name)) for mode in modes]} for name in names]
    return {"modes": modes, "rows": rows}


def config_changes(config: dict[str, Any]) -> list[list[str]]:
    """Return [key, value, default] of every setting that differs from its default."""
    if not config:
        return []
    defaults = _flatten(_plain(TrainConfig() if "algorithm" in config else SftConfig()))
    changes = []
    for key, value in _flatten(config).items():
        default = defaults.get(key)
        if _plain(value) != _plain(default):
            changes.append([key, _show(value), _show(default) if key in defaults else ""])
    return changes


def _facts(lines: Sequence[dict[str, Any]], curves: dict[str, Curve]) -> list[list[str]]:
    facts = [["steps", str(max((line["step"] for line in lines), default=0))]]
    if len(lines) > 1:
        facts.append(["from first to last line", _duration(lines[-1]["time"] - lines[0]["time"])])
    if "time/step" in curves:
        seconds = sorted(value for _, value in curves["time/step"])
        facts.append(["median step", f"{seconds[len(seconds) // 2]:.1f} s"])
    if "rollout/num_tokens_mean" in curves:
        facts.append(["tokens a response, last step", f"{curves['rollout/num_tokens_mean'][-1][1]:.0f}"])
    return facts


def _load_config(run_dir: Path) -> dict[str, Any]:
    path = run_dir / CONFIG_FILE
    if not path.exists():
        return {}
    return yaml.safe_load(path.read_text(encoding="utf-8")) or {}


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


def _view(run_dir: Path, path: Path, images: dict[str, str | None], max_groups: int) -> dict[str, Any]:
    """Return what the page shows of one rollout file."""
    groups: dict[tuple[str, int], list[StoredRollout]] = {}
    for rollout in read_rollouts(path):
        groups.setdefault((rollout.mode, rollout.group), []).append(rollout)
    ordered = sorted(groups.values(), key=lambda group: not _has_signal(group))[:max_groups]
    first = ordered[0][0] if ordered else None
    for group in ordered:
        for image in group[0].images:
            if image not in images:
                images[image] = _data_uri(image_path(run_dir, image))
    return {
        "step": first.step if first else int(path.stem.split("_")[1]),
        "split": first.split if first else "train",
        "num_groups": len(groups),
        "terms": [term.name for term in first.terms] if first else [],
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
        "terms": [[[run.start, run.end, round(run.advantage, 4)] for run in term.runs] for term in rollout.terms],
    }


def _has_signal(group: Sequence[StoredRollout]) -> bool:
    return any(run.advantage != 0 for rollout in group for term in rollout.terms for run in term.runs)


def _data_uri(path: Path) -> str | None:
    """Return the image as a data URI, reduced to a screen's size; None where the file is gone."""
    if not path.is_file():
        return None
    with Image.open(path) as opened:
        image = ImageOps.exif_transpose(opened).convert("RGB")
    small = max(image.size) <= 256
    image.thumbnail((MAX_IMAGE_SIDE, MAX_IMAGE_SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "PNG" if small else "JPEG", quality=78)
    return f"data:image/{'png' if small else 'jpeg'};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _json_ready(value: Any) -> Any:
    """Return the value with NaN and infinities as None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _json_ready(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_ready(item) for item in value]
    return value


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    return list(value) if isinstance(value, tuple) else value


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _show(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _rank(name: str) -> int:
    stem = name.split("/")[0]
    return LEADING_METRICS.index(stem) if stem in LEADING_METRICS else len(LEADING_METRICS)


def _lower_is_better(name: str) -> bool:
    return name in ("loss", "nll")


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m rsgrpo.report", description="Write a run's report as one HTML page."
    )
    parser.add_argument("run", help="run folder, e.g. runs/demo")
    parser.add_argument("--out", help=f"file to write (default: RUN/{REPORT_FILE})")
    parser.add_argument("--step", type=int, help="show the rollouts of this step only")
    parser.add_argument("--max-groups", type=int, default=MAX_GROUPS, help="groups to show of a step (default: 8)")
    options = parser.parse_args(argv)
    try:
        path = write_report(options.run, options.out, step=options.step, max_groups=options.max_groups)
    except RsgrpoError as error:
        parser.exit(error.exit_code, f"error: {error}\n")
    sys.stdout.write(f"{path}\n")
    return 0
