"""The agent's log keeps its end when it grows too large."""

from __future__ import annotations

from pathlib import Path

from skyward.node.log_size import shorten


def test_a_log_that_is_too_large_keeps_its_last_lines(tmp_path: Path) -> None:
    log = tmp_path / "agent.log"
    with log.open("ab", buffering=0) as writer:
        writer.write(b"".join(b"line %d\n" % i for i in range(300_000)))

        shorten(log, most=1_000_000, kept=1_000)
        writer.write(b"written afterwards\n")

    first, *lines = log.read_text().splitlines()
    assert first == "... the first 3 MB of this log were removed"
    assert lines[-2:] == ["line 299999", "written afterwards"]
    assert lines[:-1] == [f"line {i}" for i in range(300_000 - len(lines) + 1, 300_000)]


def test_a_log_that_is_small_stays_as_it_is(tmp_path: Path) -> None:
    log = tmp_path / "agent.log"
    log.write_text("a line\n")

    shorten(log)

    assert log.read_text() == "a line\n"
