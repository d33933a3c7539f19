"""Pools whose processes may open few files at first."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

_PROGRAM = """
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))
import logging
logging.basicConfig(format="%(message)s")
import skyward as sky

if __name__ == "__main__":
    with sky.ComputePool(concurrency={slots}, display="quiet") as pool:
        print(sum(pool.map(divmod, range(100), [10] * 100), ())[-2:], len(sky.compute(int)() @ pool.slots))
"""


def _run(folder: Path, *, slots: int, soft: int, hard: int) -> tuple[str, str]:
    """Run a pool with so many slots in a process with these limits; return what it prints and its errors."""
    program = folder / "program.py"
    program.write_text(_PROGRAM.format(slots=slots, soft=soft, hard=hard))
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=120, check=False)
    return done.stdout, done.stderr


def test_a_pool_may_need_more_files_than_the_soft_limit_allows(tmp_path: Path) -> None:
    assert _run(tmp_path, slots=8, soft=64, hard=1024) == ("(9, 9) 8\n", "")


def test_a_hard_limit_that_is_too_low_is_warned_of(tmp_path: Path) -> None:
    printed, errors = _run(tmp_path, slots=3, soft=64, hard=130)

    assert printed == "(9, 9) 3\n"
    agent, caller = errors.splitlines()
    assert agent.startswith("local: the agent may open 130 files, but needs about ")
    assert caller.startswith("this process may open 130 files, but needs about ")
    assert "`nofile` in /etc/security/limits.conf" in agent
