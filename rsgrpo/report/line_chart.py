"""A small chart of lines as an SVG file; needs Jinja2 alone, so that benchmarks draw on a bare GPU image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rsgrpo.report.templates import render

COLOURS = ("#b3541e", "#7a7a7a", "#1f5fa8", "#2e7d4f")
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 460, 280, 56, 364, 30, 236
LABEL_HEIGHT = 13.0


def line_chart(
    path: Path, title: str, x_name: str, x: Sequence[float], series: Mapping[str, Sequence[float]], *, unit: str = " s"
) -> None:
    """Write values from 0 up (seconds, or what `unit` says) against `x` as a small SVG, a labelled line per series."""
    top = max(max(values) for values in series.values()) * 1.05 or 1.0
    span = (max(x) - min(x)) or 1.0

    def column(value: float) -> float:
        return round(LEFT + (value - min(x)) / span * (RIGHT - LEFT), 1)

    def row(value: float) -> float:
        return round(BOTTOM - value / top * (BOTTOM - TOP), 1)

    lines = [
        (name, colour, [(column(at), row(value)) for at, value in zip(x, values, strict=True)])
        for (name, values), colour in zip(series.items(), COLOURS, strict=False)
    ]
    chart = render(
        "curves.svg",
        title=title,
        x_name=x_name,
        width=WIDTH,
        height=HEIGHT,
        left=LEFT,
        right=RIGHT,
        bottom=BOTTOM,
        rows=[(row(top * step / 4), f"{top * step / 4:.3g}{unit}") for step in range(5)],
        columns=[(column(value), f"{value:g}") for value in x],
        lines=lines,
        labels=_apart([points[-1][1] + 4 for _, _, points in lines]),
    )
    path.write_text(chart, encoding="utf-8")


def _apart(rows: Sequence[float]) -> list[float]:
    """Return the rows of labels moved down where they would overlap the one above.

    >>> _apart([200.0, 100.0, 104.0])
    [200.0, 100.0, 113.0]
    """
    placed, free = list(rows), -LABEL_HEIGHT
    for index in sorted(range(len(rows)), key=rows.__getitem__):
        placed[index] = max(rows[index], free)
        free = placed[index] + LABEL_HEIGHT
    return placed
