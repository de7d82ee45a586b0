"""Summarise demo runs of several seeds: scores before and after, the 95% t-interval of the gain, and the curves.

    python -m benchmarks.demo_seeds RUN RUN RUN [--curves docs/images/demo]

Each RUN is the run folder of one seed, `<folder of the seed>/runs/demo`; docs/results.md says how they are made.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rsgrpo.lab.compare import interval
from rsgrpo.records.tracking import read_metrics
from rsgrpo.report.line_chart import line_chart

SCORES = {
    "sampled F1": "val/sampled/accuracy",
    "sampled evidence": "val/sampled/evidence",
    "greedy F1": "val/greedy/accuracy",
    "greedy evidence": "val/greedy/evidence",
    "pages marked (sampled)": "val/sampled/marked_rate",
    "well formed (sampled)": "val/sampled/well_formed",
}


def curve(run: Path, key: str) -> tuple[list[int], list[float]]:
    """Return the steps and values of one metric of one run."""
    rows = [row for row in read_metrics(run) if row.get(key) is not None]
    if not rows:
        raise SystemExit(f"{run}: no {key} in metrics.jsonl; is this the run folder of `rsgrpo.train recipe=demo`?")
    return [row["step"] for row in rows], [row[key] for row in rows]


def table(runs: Sequence[Path]) -> str:
    """Return a markdown table, one row per score."""
    seeds = " | ".join(run.absolute().parent.parent.name for run in runs)
    lines = [
        f"| score | {seeds} | mean gain | 95% t-interval |",
        "|---|" + "---|" * (len(runs) + 2),
    ]
    for name, key in SCORES.items():
        ends = [(values[0], values[-1]) for _, values in (curve(run, key) for run in runs)]
        gain = interval([after - before for before, after in ends])
        low, high = gain.mean - gain.half_width, gain.mean + gain.half_width
        cells = " | ".join(f"{before:.3f} → {after:.3f}" for before, after in ends)
        lines.append(f"| {name} | {cells} | {gain.mean:+.3f} | [{low:+.3f}, {high:+.3f}] |")
    return "\n".join(lines)


def draw(runs: Sequence[Path], folder: Path) -> list[Path]:
    """Write one chart per score, one line per run; return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, key in SCORES.items():
        curves = {run.absolute().parent.parent.name: curve(run, key) for run in runs}
        steps = next(iter(curves.values()))[0]
        path = folder / f"{key.removeprefix('val/').replace('/', '_')}.svg"
        line_chart(path, name, "step", steps, {run: values for run, (_, values) in curves.items()}, unit="")
        written.append(path)
    return written


def main() -> None:
    """Print the table; write the figure where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders, one per seed, two or more")
    parser.add_argument("--curves", type=Path, help="also draw the curves into this folder")
    arguments = parser.parse_args()
    print(table(arguments.runs))
    for path in draw(arguments.runs, arguments.curves) if arguments.curves else []:
        print(path)


if __name__ == "__main__":
    main()
