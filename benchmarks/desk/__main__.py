"""The desk demo beside policies of one turn: thumbnails only, and all pages in two sizes. Fresh warm starts per seed.

    python -m benchmarks.desk [--seeds 1 2 3] [--folder desk-trial]
    python -m benchmarks.desk --table        # only the table, from the committed runs
    python -m benchmarks.desk --table --draw docs/images/desk_curves.svg

Data and model are made once (`recipes.prepare desk`). Every seed has a warm start of its own in each arm, then
reinforcement learning with the recipe's settings; held-out scores before and after come from the runs. The policies of
one turn imitate the answers of the same expert. A finished run is one small json in --results, with its metrics step by
step, and is not repeated; stop it at any time.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from rollout.files import read_jsonl, write_text
from rsgrpo.lab.compare import interval
from rsgrpo.records.tracking import read_metrics
from rsgrpo.report.line_chart import line_chart

FULL_SIZE = 112 * 56  # pixels of a page of the demo, as its file has it
SPLITS = ("sft", "train", "val")
WINDOW = 5  # steps per point of a drawn curve
RESULTS = Path(__file__).parent / "runs"
KEPT = ("reward/", "monitor/", "rollout/turns", "rollout/num_tokens_mean", "actor/entropy", "actor/grad_norm", "val/")
"""The metrics of a run that its json holds."""
CURVES = (
    "reward/answer_f1/mean",
    "reward/gold_opened/mean",
    "reward/region_overlap/mean",
    "reward/well_called/mean",
    "monitor/calls/mean",
    "rollout/turns_mean",
)
"""Of these the means along the way are printed."""
LABELS = {"desk": "page desk", "thumbnails": "thumbnails", "opened": "all pages", "pages": "all, full size"}
"""What drawn curves are called."""


@dataclass(frozen=True, slots=True)
class Arm:
    """One policy. images: the column of the desk's rows that its prompt shows; "" is the desk itself."""

    title: str
    images: str
    overrides: tuple[str, ...] = ()


ONE_TURN = ("rollout.turns.environment=", "guards.action=warn")
ARMS = {
    "desk": Arm("page desk", ""),
    "thumbnails": Arm("one turn, thumbnails only", "image", ONE_TURN),
    "opened": Arm("one turn, all pages as `open` shows them", "pages", ONE_TURN),
    "pages": Arm("one turn, all pages at full size", "pages", (*ONE_TURN, f"inputs.max_pixels={FULL_SIZE}")),
}


def prepare(folder: Path) -> None:
    """Make the demo's data and model, and from its rows those of the policies of one turn."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "desk/model/preprocessor_config.json").exists():
        program(folder, "recipes.prepare", "desk")
    data = folder / "desk/data"
    for name, arm in ARMS.items():
        for split in SPLITS if arm.images else ():
            rows = [one_turn(row, arm.images) for _, row in read_jsonl(data / f"{split}.jsonl")]
            (data / f"{name}-{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def one_turn(row: dict[str, Any], images: str) -> dict[str, Any]:
    """Return a desk row as one of a single turn: the expert's answer over some of the row's images."""
    kept = {key: row[key] for key in ("id", "question", "prompt", "answer")}
    turns = {"turns": [{"turn": row["turns"][-1]["turn"]}]} if "turns" in row else {}
    return kept | {"image": row[images]} | turns


def run(folder: Path, name: str, seed: int) -> None:
    """Warm-start and train one arm of one seed, where that has not been done."""
    arm = ARMS[name]
    prefix = f"{name}-" if arm.images else ""
    warm, trained = f"{name}-sft-{seed}", f"{name}-rl-{seed}"
    rows = {split: f"desk/data/{prefix}{split}.jsonl" for split in SPLITS}
    shared = (f"seed={seed}", "output_dir=runs", f"data.val={rows['val']}", *arm.overrides)
    if not (folder / f"runs/{warm}/export/preprocessor_config.json").exists():
        own = [override for override in shared if not override.startswith("guards.")]
        own += [f"name={warm}", f"data.train={rows['sft']}", "validation.every=0", "checkpoint.keep_best=0"]
        program(folder, "recipes.sft", "recipe=sft_desk_demo", *own)
    if not (folder / f"runs/{trained}/export/preprocessor_config.json").exists():
        where = (f"name={trained}", f"data.train={rows['train']}", f"model.path=runs/{warm}/export")
        program(folder, "rsgrpo.train", "recipe=desk_demo", *shared, *where)


def program(folder: Path, module: str, *arguments: str) -> None:
    """Run one of our programs in a folder."""
    print(f"python -m {module} {' '.join(arguments)}", flush=True)
    subprocess.run([sys.executable, "-m", module, *arguments], cwd=folder, check=True)


def store(run_dir: Path, name: str, seed: int, results: Path) -> None:
    """Write what a finished run measured: per metric its steps and values."""
    metrics: dict[str, dict[str, list[float]]] = {}
    for row in read_metrics(run_dir):
        for metric, value in row.items():
            if metric.startswith(KEPT) and not metric.endswith("/std") and value is not None:
                curve = metrics.setdefault(metric, {"step": [], "value": []})
                curve["step"].append(row["step"])
                curve["value"].append(round(value, 4))
    results.mkdir(parents=True, exist_ok=True)
    content = json.dumps({"arm": name, "seed": seed, "metrics": metrics})
    write_text(results / f"{name}-seed{seed}.json", content)


def table(results: Path) -> str:
    """Return held-out scores before and after, and the gain with its 95% t interval, per arm."""
    lines = [f"| policy | seeds | sampled F1 | gain | greedy F1 | calls per question |\n|{'---|' * 6}"]
    for name, arm in ARMS.items():
        runs = [json.loads(path.read_text())["metrics"] for path in sorted(results.glob(f"{name}-seed*.json"))]
        if not runs:
            continue
        f1 = [run["val/sampled/answer_f1"]["value"] for run in runs]
        gain = interval([after - before for before, *_, after in f1])
        cells = [
            " → ".join(f"{sum(run[f'val/{key}']['value'][at] for run in runs) / len(runs):.3f}" for at in (0, -1))
            for key in ("sampled/answer_f1", "greedy/answer_f1", "sampled/calls")
        ]
        lines.append(f"| {arm.title} | {len(runs)} | {cells[0]} | {gain} | {cells[1]} | {cells[2]} |")
    return "\n".join(lines)


def curves(results: Path, stride: int = 8) -> str:
    """Return what the desk's training responses were like along the way: means over `stride` steps and all seeds."""
    runs = [json.loads(path.read_text())["metrics"] for path in sorted(results.glob("desk-seed*.json"))]
    steps = range(1, runs[0][CURVES[0]]["step"][-1] + 1, stride) if runs else range(0)
    lines = [f"| training responses, steps | {' | '.join(f'{step}-{step + stride - 1}' for step in steps)} |"]
    lines += ["|---" * (len(steps) + 1) + "|"]
    for metric in CURVES:
        points = [point for run in runs for point in zip(run[metric]["step"], run[metric]["value"], strict=True)]
        means = [fmean(value for at, value in points if step <= at < step + stride) for step in steps]
        lines.append(f"| `{metric}` | {' | '.join(f'{mean:.3f}' for mean in means)} |")
    return "\n".join(lines)


def draw(results: Path, out: Path) -> None:
    """Draw how the answer F1 of the training responses rises, per arm: means over seeds and over windows of steps."""
    series: dict[str, list[float]] = {}
    for name in ARMS:
        files = sorted(results.glob(f"{name}-seed*.json"))
        runs = [json.loads(file.read_text())["metrics"][CURVES[0]] for file in files]
        steps = [fmean(values) for values in zip(*(run["value"] for run in runs), strict=True)]
        if steps:
            series[LABELS[name]] = [fmean(steps[start : start + WINDOW]) for start in range(0, len(steps), WINDOW)]
    ends = [WINDOW * (number + 1) for number in range(max(map(len, series.values())))]
    line_chart(out, "answer F1 of the rollouts, by step", "step", ends, series, unit="")


def main() -> None:
    """Run what is missing; print the tables."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.desk", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of warm start and training")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="policies to run")
    parser.add_argument("--folder", type=Path, default=Path("desk-trial"), help="where everything is")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the finished runs' metrics")
    parser.add_argument("--table", action="store_true", help="run nothing")
    parser.add_argument("--draw", type=Path, metavar="FILE.svg", help="also draw the learning curves")
    options = parser.parse_args()
    folder, results = options.folder.absolute(), options.results.absolute()
    missing = [
        (name, seed)
        for seed in options.seeds
        for name in options.arms
        if not options.table and not (results / f"{name}-seed{seed}.json").exists()
    ]
    if missing:
        prepare(folder)
    for name, seed in missing:
        run(folder, name, seed)
        store(folder / f"runs/{name}-rl-{seed}", name, seed, results)
    print(table(results), curves(results), sep="\n\n")
    if options.draw:
        draw(results, options.draw)


if __name__ == "__main__":
    main()
