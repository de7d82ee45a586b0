"""A line chart as a small SVG file, with no plotting library: for model cards and benchmarks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

COLOURS = ("#b3541e", "#7a7a7a", "#1f5fa8", "#2e7d4f")
WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 460, 280, 56, 44, 30, 96


def line_chart(
    path: Path, title: str, x_name: str, x: Sequence[float], series: Mapping[str, Sequence[float]], *, unit: str = " s"
) -> None:
    """Write values from 0 up (seconds, or what `unit` says) against `x`, one labelled line per series."""
    top = max(max(values) for values in series.values()) * 1.05 or 1.0
    span = (max(x) - min(x)) or 1.0

    def place(value: float, second: float) -> tuple[float, float]:
        column = LEFT + (value - min(x)) / span * (WIDTH - LEFT - RIGHT)
        return column, HEIGHT - BOTTOM - second / top * (HEIGHT - BOTTOM - TOP)

    box = f'viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="11"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {box}>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="18" font-size="13">{title}</text>',
        f'<text x="{(WIDTH - RIGHT + LEFT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{x_name}</text>',
    ]
    for step in range(5):
        second = top * step / 4
        _, y = place(x[0], second)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{second:.3g}{unit}</text>')
    for value in x:
        column, _ = place(value, 0)
        parts.append(f'<text x="{column:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{value:g}</text>')
    for (name, values), colour in zip(series.items(), COLOURS, strict=False):
        points = [place(*point) for point in zip(x, values, strict=True)]
        line = " ".join(f"{column:.1f},{y:.1f}" for column, y in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{column:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for column, y in points]
        parts.append(f'<text x="{points[-1][0] + 8:.1f}" y="{points[-1][1] + 4:.1f}" fill="{colour}">{name}</text>')
    path.write_text("\n".join([*parts, "</svg>"]) + "\n", encoding="utf-8")
