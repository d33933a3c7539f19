"""`LogConfig`: a pool's log in a file."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

import skyward as sky
from skyward.console.logfile import LogFile


@sky.compute
def say(text: str) -> None:
    print(text)


def test_events_prints_and_log_records_go_into_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "logs" / "pool.log"
    config = sky.LogConfig(file=str(file), console=False)
    before = list(logging.getLogger("skyward").handlers)

    with sky.ComputePool(provider="local", logging=config) as pool:
        say("hello from there") >> pool
        logging.getLogger("skyward.tests").info("and from here")

    text = file.read_text()
    assert "INFO" in text
    assert "[node 0] hello from there" in text
    assert "and from here" in text
    assert text.index("PoolStarted") < text.index("hello") < text.index("PoolStopping")
    assert capsys.readouterr() == ("", "")
    assert logging.getLogger("skyward").handlers == before


def test_a_level_leaves_out_what_is_below_it(tmp_path: Path) -> None:
    file = tmp_path / "pool.log"

    with sky.ComputePool(provider="local", display="quiet", logging=sky.LogConfig(level="ERROR", file=str(file))):
        say("hello") >> sky

    assert file.read_text() == ""


def test_a_full_file_is_put_aside_and_the_oldest_go(tmp_path: Path) -> None:
    file = tmp_path / "pool.log"
    config = sky.LogConfig(file=str(file), rotation="1 MB", retention=2)

    with sky.ComputePool(provider="local", display="quiet", logging=config):
        for _ in range(5):
            say("\n".join("x" * 1000 for _ in range(1000))) >> sky

    assert sorted(p.name for p in tmp_path.iterdir()) == ["pool.log", "pool.log.1", "pool.log.2"]


def test_a_file_that_cant_be_written_is_told_before_anything_starts(tmp_path: Path) -> None:
    with (
        pytest.raises(OSError, match="directory"),
        sky.ComputePool(provider="local", display="quiet", logging=sky.LogConfig(file=str(tmp_path))),
    ):
        pass


def test_files_that_are_closed_out_of_order_leave_the_logger_as_it_was(tmp_path: Path) -> None:
    logger = logging.getLogger("skyward")
    before = logger.level
    first, second = (
        LogFile(sky.LogConfig(level="DEBUG", file=str(tmp_path / name)), "abcdef01") for name in ("first", "second")
    )

    first.close()
    logger.debug("still wanted")
    second.close()
    second.close()

    assert logger.level == before
    assert "still wanted" in (tmp_path / "second").read_text()
    assert "still wanted" not in (tmp_path / "first").read_text()
