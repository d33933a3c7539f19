"""What came of the runs of a soak, one line per fault."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from tests.soak.faults import Fault, Plan

End = Literal["survived", "clear failure", "ended", "unclear failure", "hung"]


@dataclass
class Outcome:
    """What came of one run.

    Attributes
    ----------
    end
        How the client ended: with all its work done, with a `SkywardError`, by the signal it was sent, in another way,
        or not within the time allowed.
    lost, doubled, wrong
        Results.
    left
        Processes, files and entries that were there when their time was over.
    clean_s
        Seconds from the end of the client, or of a machine's network, until all was clean.
    """

    plan: Plan
    phase: str = ""
    end: End = "hung"
    said: str = ""
    lost: int = 0
    doubled: int = 0
    wrong: int = 0
    left: list[str] = field(default_factory=list)
    clean_s: float = 0.0
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        parts = [f"{self.plan.number:3}  {self.plan}  [{self.phase}]: {self.end}, clean after {self.clean_s:.1f} s"]
        if self.said:
            parts.append(f"     it said: {self.said}")
        return "\n".join([*parts, *(f"     PROBLEM: {p}" for p in self.problems)])


_HEADING = (
    "fault", "runs", "survived", "clear failure", "ended", "hung or unclear", "results lost / doubled / wrong",
    "left behind", "clean-up, longest",
)  # fmt: skip


def table(outcomes: Sequence[Outcome]) -> str:
    """Return the runs as a table in Markdown."""
    rows: list[tuple[str, ...]] = [_HEADING]
    for fault in Fault:
        rows += _row(fault.value, [o for o in outcomes if o.plan.fault is fault])
    rows += _row("all", outcomes)
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADING))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in rows]
    return "\n".join([lines[0], "|-" + "-|-".join("-" * w for w in widths) + "-|", *lines[1:]])


def _row(name: str, runs: Sequence[Outcome]) -> list[tuple[str, ...]]:
    if not runs:
        return []

    def count(*ends: End) -> str:
        return str(sum(o.end in ends for o in runs))

    return [
        (
            name,
            str(len(runs)),
            count("survived"),
            count("clear failure"),
            count("ended"),
            count("hung", "unclear failure"),
            f"{sum(o.lost for o in runs)} / {sum(o.doubled for o in runs)} / {sum(o.wrong for o in runs)}",
            str(sum(len(o.left) for o in runs)),
            f"{max(o.clean_s for o in runs):.1f} s",
        )
    ]
