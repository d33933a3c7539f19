"""What `bench.py` or `wan.py` has found, as a table and as JSON: figures, ratios, targets, and where it ran."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import statistics
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.case import Row, Target

COLUMNS = ("skyward", "Dask", "loky", "processes", "Ray", "ideal", "TLS socket", "no preload", "floor", "distinct")
EXPLANATION = """\
Medians; less is better. In brackets: skyward's figure divided by this one, so below 1 skyward is ahead. In rows that
begin with "Parallel", and for scikit-learn, each column is that peer's joblib backend."""


@dataclass
class Found:
    """The figures of one row, one per round, by contestant; what went wrong instead."""

    row: Row
    figures: dict[str, list[float]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def median(self, name: str) -> float | None:
        figures = self.figures.get(name)
        return statistics.median(figures) if figures and name not in self.failures else None

    def verdict(self, target: Target) -> tuple[str, str]:
        """Return what was measured, and whether that is enough."""
        ours = self.median("skyward")
        theirs = 1.0 if target.peer is None else self.median(target.peer)
        if ours is None or theirs is None:
            return "—", "not measured"
        met = "met" if ours <= target.factor * theirs else "**missed**"
        if target.peer is None:
            return show(ours, self.row.unit), met
        ratio = ours / theirs if theirs else float("inf")
        return (f"{1 / ratio:.3g} × as fast" if "as fast" in target.text else f"{ratio:.3g} ×"), met


def show(figure: float, unit: str) -> str:
    if unit == "s":
        for factor, name in ((1, "s"), (1e3, "ms"), (1e6, "µs")):
            if figure * factor >= 0.9995 or name == "µs":
                return f"{figure * factor:.3g} {name}"
    return f"{figure:,.0f} {unit}" if unit else f"{figure:.2f}"


def markdown(found: list[Found], facts: Mapping[str, Any], missing: Mapping[str, str]) -> str:
    return "\n".join(
        [*_figures(found), "", EXPLANATION, *_notes(found, missing), "", *_targets(found), "", *_facts(facts)]
    )


def _figures(found: list[Found]) -> Iterator[str]:
    columns = [c for c in COLUMNS if any(c in f.row.contestants for f in found)]
    yield f"| | {' | '.join(columns)} |"
    yield "|---" * (len(columns) + 1) + "|"
    for each in found:
        yield f"| {each.row.title} | {' | '.join(_cell(each, c) for c in columns)} |"


def _cell(found: Found, name: str) -> str:
    if name in found.failures:
        return "failed"
    figure, ours = found.median(name), found.median("skyward")
    if figure is None:
        return "—"
    text = show(figure, found.row.unit)
    if name == "skyward" or ours is None or figure <= 0:
        return text
    ratio = ours / figure
    return f"{text} ({ratio:,.0f})" if ratio >= 10 else f"{text} ({ratio:.2g})"


def _notes(found: list[Found], missing: Mapping[str, str]) -> Iterator[str]:
    for name, reason in missing.items():
        yield f"{name} could not be started: {reason}"
    for each in found:
        for name, text in each.failures.items():
            yield f"Failed: {each.row.title}, {name}: {text}"


def _targets(found: list[Found]) -> Iterator[str]:
    yield "| | target | measured | |"
    yield "|---|---|---|---|"
    for each in found:
        for target in each.row.targets:
            yield f"| {each.row.title} | {target.text} | {' | '.join(each.verdict(target))} |"


def _facts(facts: Mapping[str, Any]) -> Iterator[str]:
    yield "; ".join(f"{name} {value}" for name, value in facts["versions"].items())
    yield ""
    yield "; ".join(f"{name}: {value}" for name, value in facts.items() if name != "versions")


def facts(rounds: int, *, quick: bool) -> dict[str, Any]:
    names = ("skyward", "dask", "distributed", "joblib", "ray", "numpy", "scikit-learn", "cloudpickle")
    versions = {"Python": platform.python_version()}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "versions": versions,
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "rounds": f"{rounds}, quick sizes" if quick else rounds,
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory": f"{psutil.virtual_memory().total / 1e9:.0f} GB",
        "system": f"{platform.system()} {platform.release()}",
        "load before": f"{os.getloadavg()[0]:.2f}",
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def as_json(found: list[Found], facts: Mapping[str, Any], missing: Mapping[str, str]) -> dict[str, Any]:
    rows = [
        {
            "title": each.row.title,
            "unit": each.row.unit,
            "figures": each.figures,
            "failures": each.failures,
            "targets": [{"target": t.text, "verdict": each.verdict(t)} for t in each.row.targets],
        }
        for each in found
    ]
    return {**facts, "missing": missing, "rows": rows}
