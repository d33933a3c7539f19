"""skyward beside raw Dask, joblib's loky and Dask backends, Python's own process pool, and Ray.

Usage: python benchmarks/bench.py [--rounds N] [--only CASE,...] [--quick] [--json FILE]

In each round every contestant of a row has its turn, in an order that changes from round to round, so that a busy
moment of the machine hits all alike. All peers of a case run meanwhile, idle but for the one whose turn it is.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for benchmarks.*

from benchmarks import report
from benchmarks.case import Case, Pick
from benchmarks.cases import CASES

ROOT = Path(__file__).resolve().parent.parent


def measure(
    case: Case, rounds: int, pick: Pick, missing: dict[str, str], tell: Callable[[str], None]
) -> list[report.Found]:
    """Return what was found for each row of a case; name in `missing` the peers that could not be started, and why."""
    with contextlib.ExitStack() as stack:
        peers: dict[str, Any] = {}
        for name, start in case.peers.items():
            tell(f"starting {name}")
            try:
                peers[name] = stack.enter_context(start(case.workers or os.cpu_count() or 1))
            except Exception as exc:  # whatever keeps it from starting: the others are still worth measuring
                missing[name] = f"{type(exc).__name__}: {exc}".partition("\n")[0]
        if case.warm_up:
            tell("warming up")
            for row in case.rows(peers, quickly):
                _round(report.Found(row), 0)
        found = [report.Found(row) for row in case.rows(peers, pick)]
        for number in range(rounds):
            tell(f"round {number + 1}")
            for each in found:
                _round(each, number)
        return found


def _round(found: report.Found, number: int) -> None:
    names = list(found.row.contestants)
    turn = number % len(names)
    for name in names[turn:] + names[:turn]:
        if name not in found.failures:
            try:
                found.figures.setdefault(name, []).append(found.row.contestants[name]())
            except Exception as exc:  # as above
                found.failures[name] = f"{type(exc).__name__}: {exc}".partition("\n")[0]


def fully(full: int, quick: int) -> int:  # noqa: ARG001 - as Pick wants it
    return full


def quickly(full: int, quick: int) -> int:  # noqa: ARG001
    return quick


@contextlib.contextmanager
def _surroundings() -> Iterator[None]:
    """Give all processes a way to the cases, and a journal that is no business of the user's."""
    with tempfile.TemporaryDirectory(prefix="skyward-bench-") as folder:
        os.environ["SKYWARD_DATA_DIR"] = folder
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        yield


def _tell(started: float, name: str, what: str) -> None:
    print(f"{time.perf_counter() - started:5.0f} s  {name}: {what}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", metavar="CASE,...", help=f"of {', '.join(CASES)}")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see whether it works")
    parser.add_argument("--json", type=Path, metavar="FILE", default=ROOT / "build" / "bench.json",
                        help="write every figure into it, and the table beside it, ending in .md")  # fmt: skip
    options = parser.parse_args()
    names = options.only.split(",") if options.only else list(CASES)
    if unknown := [name for name in names if name not in CASES]:
        parser.error(f"--only {','.join(unknown)} is invalid: expected {', '.join(CASES)}")

    facts = report.facts(options.rounds, quick=options.quick)
    started = time.perf_counter()
    found: list[report.Found] = []
    missing: dict[str, str] = {}
    with _surroundings(), contextlib.redirect_stdout(sys.stderr):  # where Ray prints now and then
        for name in names:
            tell = partial(_tell, started, name)
            found += measure(CASES[name], options.rounds, quickly if options.quick else fully, missing, tell)
    table = report.markdown(found, facts, missing)
    print(table)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(report.as_json(found, facts, missing), indent=1) + "\n")
    options.json.with_suffix(".md").write_text(table + "\n")


if __name__ == "__main__":
    main()
