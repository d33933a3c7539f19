"""Logs of machines that failed: where they are kept, for whom, and for how long."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from skyward.cluster import boot_logs


@pytest.fixture(autouse=True)
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SKYWARD_DATA_DIR", str(tmp_path / "data"))
    return tmp_path / "data"


def test_a_log_is_kept_under_its_pool_and_machine_for_this_user_only(data: Path) -> None:
    path = boot_logs.keep("abcdef01", "root@10.0.0.5:2222", "what it said\n")

    assert path == data / "logs" / "abcdef01" / "root@10.0.0.5:2222.log"
    assert path.read_text() == "what it said\n"
    assert path.stat().st_mode & 0o777 == 0o600
    assert (data / "logs").stat().st_mode & 0o777 == 0o700


def test_a_machine_s_name_does_not_lead_elsewhere() -> None:
    assert boot_logs.path_of("abcdef01", "../../etc/passwd").parent == boot_logs.path_of("abcdef01", "i-1").parent


def test_of_a_long_log_the_end_is_kept() -> None:
    path = boot_logs.keep("abcdef01", "i-1", "x" * 3_000_000 + "the end")

    assert path is not None
    assert path.stat().st_size < boot_logs.MOST_BYTES + 100
    assert path.read_text().startswith("... the beginning")
    assert path.read_text().endswith("the end")


def test_old_logs_are_removed_when_a_new_one_is_kept() -> None:
    old, young = boot_logs.keep("00000001", "i-1", "old"), boot_logs.keep("00000002", "i-2", "young")
    assert old is not None
    assert young is not None
    for path, days in ((old, 31), (young, 29)):
        os.utime(path, (time.time() - days * 86_400,) * 2)

    boot_logs.keep("00000003", "i-3", "new")

    assert not old.parent.exists()
    assert young.exists()


def test_a_log_that_can_not_be_kept_is_a_warning_only(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    data.mkdir()
    (data / "logs").write_text("in the way")

    assert boot_logs.keep("abcdef01", "i-1", "text") is None
    assert "i-1 can't be kept" in caplog.text
