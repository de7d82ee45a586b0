"""The desk demo beside policies of one turn: thumbnails only, and all pages in two sizes. Fresh warm starts per seed.

    python -m benchmarks.desk [--seeds 1 2 3] [--folder desk-trial]
    python -m benchmarks.desk --table        # only the table, from the runs in --folder

Data and model are made once (`recipes.prepare desk`). Every seed has a warm start of its own in each arm, then
reinforcement learning with the recipe's settings; held-out scores before and after come from the runs. The policies of
one turn imitate the answers of the same expert. A run that is there is not repeated; stop it at any time.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rollout.files import read_jsonl
from rsgrpo.lab.compare import interval
from rsgrpo.records.tracking import read_metrics

FULL_SIZE = 112 * 56  # pixels of a page of the demo, as its file has it
SPLITS = ("sft", "train", "val")


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


def table(folder: Path, seeds: Sequence[int]) -> str:
    """Return held-out scores before and after, and the gain with its 95% t interval, per arm."""
    lines = [
        f"| policy | seeds | sampled F1 | gain | greedy F1 | calls per question |\n|{'---|' * 6}",
    ]
    for name, arm in ARMS.items():
        runs = [folder / f"runs/{name}-rl-{seed}" for seed in seeds]
        ends = [first_and_last(run) for run in runs if (run / "export").exists()]
        if not ends:
            continue
        gain = interval([after["sampled/answer_f1"] - before["sampled/answer_f1"] for before, after in ends])
        cells = [
            " → ".join(f"{sum(end[at][key] for end in ends) / len(ends):.3f}" for at in (0, 1))
            for key in ("sampled/answer_f1", "greedy/answer_f1", "sampled/calls")
        ]
        lines.append(f"| {arm.title} | {len(ends)} | {cells[0]} | {gain} | {cells[1]} | {cells[2]} |")
    return "\n".join(lines)


def first_and_last(run: Path) -> tuple[dict[str, float], dict[str, float]]:
    """Return a run's first and last held-out scores, without `val/`."""
    rows = [row for row in read_metrics(run) if "val/sampled/answer_f1" in row]
    first, *_, last = [{key.removeprefix("val/"): value for key, value in row.items()} for row in rows]
    return first, last


def main() -> None:
    """Run what is missing; print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of warm start and training")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="policies to run")
    parser.add_argument("--folder", type=Path, default=Path("desk-trial"), help="where everything is")
    parser.add_argument("--table", action="store_true", help="run nothing")
    options = parser.parse_args()
    folder = options.folder.absolute()
    if not options.table:
        prepare(folder)
        for seed in options.seeds:
            for name in options.arms:
                run(folder, name, seed)
    print(table(folder, options.seeds))


if __name__ == "__main__":
    main()
