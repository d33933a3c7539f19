"""What a pool logs, and where."""

from __future__ import annotations

from dataclasses import dataclass

from skyward.spec.validation import (
    Problems,
    check_bool,
    check_choice,
    check_count,
    check_text,
    parse_memory,
)

LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


@dataclass(frozen=True, slots=True)
class LogConfig:
    """Where the pool's log goes. At the size `rotation` a new file is started; `retention` is how many old files stay.

    `prefix`: whether ``[node 0]`` is shown before each line that a call prints.
    """

    level: str = "INFO"
    file: str | None = None
    console: bool = True
    rotation: str | int = "50 MB"
    retention: int = 10
    prefix: bool = True

    def __post_init__(self) -> None:
        problems = Problems("LogConfig")
        problems.check("level", self.level, check_choice(LEVELS))
        problems.check("file", self.file, check_text, optional=True)
        problems.check("console", self.console, check_bool)
        problems.check("rotation", self.rotation, parse_memory)
        problems.check("retention", self.retention, check_count(1))
        problems.check("prefix", self.prefix, check_bool)
        problems.raise_if_any()
