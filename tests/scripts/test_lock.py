"""The lock that scripts take on the skyward folder, also where hosts share it and flock does nothing."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from skyward.scripts import lock
from tests.waiting import wait_until

SHELLS = [shell for shell in ("sh", "bash", "busybox") if shutil.which(shell)]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A skyward folder for scripts whose flock lets everyone in at once."""
    flock = tmp_path / "bin" / "flock"
    flock.parent.mkdir()
    flock.write_text("#!/bin/sh\nexit ${FLOCK:-0}\n")
    flock.chmod(0o755)
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


def start(home: Path, work: str, *, shell: str = "sh", flock: int = 0) -> subprocess.Popen[str]:
    text = f"set -u\nhome={home}\nsay() {{ echo \"$*\"; }}\n{lock.shell()}\n{work}\n"
    environment = {"PATH": f"{home.parent}/bin:{os.environ['PATH']}", "FLOCK": str(flock)}
    command = ["busybox", "sh"] if shell == "busybox" else [shell]
    pipe = subprocess.PIPE
    return subprocess.Popen([*command, "-c", text], env=environment, text=True, stdout=pipe, stderr=pipe)


def finish(process: subprocess.Popen[str]) -> str:
    output, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (0, "")
    return output


@pytest.mark.parametrize("shell", SHELLS)
def test_only_one_script_at_a_time_has_the_lock_where_flock_does_nothing(home: Path, shell: str) -> None:
    work = 'mkdir "$home/alone" || exit 1; sleep 0.2; rmdir "$home/alone"'

    scripts = [start(home, work, shell=shell, flock=status) for status in (0, 0, 71)]

    for script in scripts:
        finish(script)
    assert not (home / "lock.d").exists()


def test_a_flock_that_fails_is_noted(home: Path) -> None:
    assert f"flock fails with status 71 in {home}" in finish(start(home, 'echo "$no_flock"', flock=71))


def test_the_lock_of_a_script_that_was_killed_here_is_taken_at_once(home: Path) -> None:
    killed = start(home, "echo mine; sleep 60 > /dev/null 2>&1")
    assert killed.stdout is not None
    killed.stdout.readline()
    killed.kill()
    killed.communicate()

    assert "wait" not in finish(start(home, "echo mine"))


def test_the_lock_of_another_host_is_taken_when_it_shows_no_change(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "STALE_S", 2)
    owner = home / "lock.d" / "far_1234_5.1.ab"
    owner.parent.mkdir()
    owner.write_text("1")

    assert finish(start(home, "echo mine")).splitlines() == ["step wait: for far", "mine"]
    assert not owner.exists()


def test_the_lock_of_another_host_that_lives_is_waited_for(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "STALE_S", 3)
    owner = home / "lock.d" / "far_1234_5.1.ab"
    owner.parent.mkdir()
    owner.write_text("0")
    script = start(home, "echo mine")
    beats = iter(range(460))  # two in 0.02 s

    def beat() -> bool:
        owner.write_text(str(next(beats, "")))
        return next(beats, None) is None

    wait_until(beat)
    assert script.poll() is None
    owner.unlink()
    owner.parent.rmdir()

    assert "mine" in finish(script)


def test_a_folder_where_no_lock_can_be_made_is_told(home: Path) -> None:
    mkdir = home.parent / "bin" / "mkdir"
    mkdir.write_text("#!/bin/sh\necho 'mkdir: no space left on device' >&2\nexit 1\n")
    mkdir.chmod(0o755)
    script = start(home, "echo mine")

    output, error = script.communicate(timeout=60)

    assert script.returncode == 1
    assert "mine" not in output
    assert "no space left" in error


@pytest.mark.parametrize("shell", SHELLS)
def test_no_process_stays_when_a_script_has_ended(home: Path, shell: str) -> None:
    finish(start(home, "sleep 0.1", shell=shell))

    assert [p for p in Path("/proc").glob("[0-9]*/environ") if f"{home.parent}/bin:".encode() in _read(p)] == []


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # it has ended, or is another user's
        return b""
