"""Draws what `bench.py` or `wan.py` has written as JSON: how many times skyward's time, memory or bytes others need.

Usage: python benchmarks/chart.py build/bench.json docs/pictures/bench.svg
"""

from __future__ import annotations

import html
import json
import math
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

COLOURS = {"Dask": "#d9822b", "loky": "#2f6fb3", "processes": "#7a7a7a", "Ray": "#8a4fbf"}
LEFT, WIDTH, ROW, TOP = 430, 960, 22, 64
LEAST, MOST = 0.1, 100.0
"""The ends of the axis: what is beyond is drawn there, as a triangle."""


def ratios(row: Mapping[str, Any]) -> dict[str, float]:
    """Return each tool's median in a row divided by skyward's."""
    medians = {name: statistics.median(figures) for name, figures in row["figures"].items() if figures}
    ours = medians.get("skyward", 0.0)
    return {name: medians[name] / ours for name in COLOURS if name in medians} if ours > 0 else {}


def x(ratio: float) -> float:
    share = math.log(min(max(ratio, LEAST), MOST) / LEAST) / math.log(MOST / LEAST)
    return LEFT + share * (WIDTH - LEFT - 24)


def svg(rows: Sequence[Mapping[str, Any]]) -> str:
    shown = [(row["title"].rstrip(" *"), found) for row in rows if (found := ratios(row))]
    height = TOP + ROW * len(shown) + 16
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" '
            'font-size="13">',
            f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
            *_axis(height, {name for _, found in shown for name in found}),
            *(line for i, (title, found) in enumerate(shown) for line in _row(TOP + ROW * i + ROW // 2, title, found)),
            "</svg>\n",
        ]
    )


def _axis(height: int, tools: set[str]) -> Iterator[str]:
    yield from _text(LEFT - 12, 20, "times skyward's figure: right of 1, skyward needs less", "end", "#555555")
    for i, name in enumerate(name for name in COLOURS if name in tools):
        yield _mark(LEFT + 20 + 100 * i, 16, 1.0, COLOURS[name])
        yield from _text(LEFT + 30 + 100 * i, 20, name, "start")
    for ratio in (0.1, 0.3, 1, 3, 10, 30, 100):
        colour = "#333333" if ratio == 1 else "#dddddd"
        yield f'<line x1="{x(ratio):.0f}" x2="{x(ratio):.0f}" y1="{TOP - 8}" y2="{height - 12}" stroke="{colour}"/>'
        yield from _text(x(ratio), TOP - 14, f"{ratio:g} ×", "middle", "#555555")


def _row(y: int, title: str, found: Mapping[str, float]) -> Iterator[str]:
    yield from _text(LEFT - 12, y + 4, title, "end")
    yield f'<line x1="{LEFT}" x2="{WIDTH - 24}" y1="{y}" y2="{y}" stroke="#f0f0f0"/>'
    for name, ratio in found.items():
        yield _mark(x(ratio), y, ratio, COLOURS[name], f"{title}: {name} {ratio:.2g} ×")


def _mark(at: float, y: int, ratio: float, colour: str, title: str = "") -> str:
    inner = f"<title>{html.escape(title)}</title>" if title else ""
    if LEAST <= ratio <= MOST:
        return f'<circle cx="{at:.1f}" cy="{y}" r="5" fill="{colour}">{inner}</circle>'
    tip = 8 if ratio > MOST else -8
    return f'<path d="M{at - tip / 2:.1f},{y - 5} l{tip},5 l{-tip},5 z" fill="{colour}">{inner}</path>'


def _text(at: float, y: float, text: str, anchor: str, colour: str = "#222222") -> Iterator[str]:
    yield f'<text x="{at:.0f}" y="{y}" text-anchor="{anchor}" fill="{colour}">{html.escape(text)}</text>'


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    source, target = map(Path, sys.argv[1:])
    target.write_text(svg(json.loads(source.read_text())["rows"]))


if __name__ == "__main__":
    main()
