"""RS-GRPO against its ablations on the demo's task, same budget: one table with intervals over seeds.

    python -m benchmarks.ablations [--seeds 0 1 2 3 4] [--steps 40] [--level easy] [--folder ablations]

Every seed has its own data, model and warm start, from which each arm starts. Finished stages are not run again, so an
interrupted study resumes. An arm takes about two minutes on two cores, a warm start six. `--table` only prints.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.demo_seeds import SCORES, curve, interval

ARMS = {
    "per_reward": "RS-GRPO",
    "per_scope": "per scope (paper)",
    "widen": "widened scopes (released code)",
    "grpo": "plain GRPO",
}
BASELINE = "grpo"
EXPORTED = "preprocessor_config.json"  # the file that an export writes last


def run_of(folder: Path, arm: str) -> Path:
    """Return the run folder of one arm of one seed."""
    found = sorted(folder.glob(f"runs/demo-algorithm={arm},*"))
    if len(found) != 1:
        raise SystemExit(f"{folder}: {len(found)} runs of {arm}, not 1. Run the study, or name another --folder.")
    return found[0]


def study(folder: Path, seed: int, steps: int, level: str) -> None:
    """Make one seed's data, model and warm start, then run every arm (one hydra multirun)."""
    folder.mkdir(parents=True, exist_ok=True)
    stages = [
        ("demo/model", ["recipes.prepare", "demo", "--seed", f"{seed}", "--level", level]),
        ("demo/sft/export", ["recipes.sft", "recipe=sft_demo", f"seed={seed}"]),
    ]
    sweep = ["rsgrpo.train", "-m", "recipe=demo", f"seed={seed}", f"total_steps={steps}", f"algorithm={','.join(ARMS)}"]
    missing = [command for made, command in stages if not (folder / made / EXPORTED).exists()]
    for command in [*missing, sweep]:
        print(f"{folder}: python -m {' '.join(command)}", flush=True)
        subprocess.run([sys.executable, "-m", *command], cwd=folder, check=True)


def table(folders: Sequence[Path]) -> str:
    """Return a markdown table: per arm the mean score after the run, and its paired difference from plain GRPO."""
    lines = [f"Mean over {len(folders)} seeds after the run; in brackets the difference from plain GRPO (95%)."]
    lines += ["", f"| score | before | {' | '.join(ARMS.values())} |", "|---|" + "---|" * (len(ARMS) + 1)]
    for name, key in SCORES.items():
        ends = {arm: np.array([curve(run_of(folder, arm), key)[1][-1] for folder in folders]) for arm in ARMS}
        before = np.mean([curve(run_of(folder, BASELINE), key)[1][0] for folder in folders])
        cells = []
        for arm, values in ends.items():
            mean, half = interval(values - ends[BASELINE])
            paired = "" if arm == BASELINE else f" [{mean:+.3f} ± {half:.3f}]"
            cells.append(f"{values.mean():.3f}{paired}")
        lines.append(f"| {name} | {before:.3f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Run the stages that are missing; print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4], help="2 to 10 seeds")
    parser.add_argument("--steps", type=int, default=40, help="RL steps of every arm")
    parser.add_argument("--level", default="easy", help="of the demo's questions, as in `recipes.prepare demo`")
    parser.add_argument("--folder", type=Path, default=Path("ablations"), help="where the seeds' folders are made")
    parser.add_argument("--table", action="store_true", help="run nothing; print the table of finished runs")
    arguments = parser.parse_args()
    folders = [arguments.folder / f"seed{seed}" for seed in arguments.seeds]
    for seed, folder in zip(arguments.seeds, folders, strict=True):
        if not arguments.table:
            study(folder.absolute(), seed, arguments.steps, arguments.level)
    print(table(folders))


if __name__ == "__main__":
    main()
