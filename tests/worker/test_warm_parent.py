"""`Image(preload=...)`: modules are imported once, by the process that all workers of a node are forked from."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask.system
import pytest

import skyward as sky
from tests.waiting import wait_until

_EARLY = """
import os, sys, threading
print("early is imported")
PID = os.getpid()
READ = sys.stdin.read()
threading.Thread(target=threading.Event().wait, daemon=True).start()
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of installed modules: `early`, and some that can't be imported."""
    folder = tmp_path_factory.mktemp("environment") / "site-packages"
    folder.mkdir()
    (folder / "early.py").write_text(_EARLY)
    (folder / "raises.py").write_text("def divide(): 1 / 0\n\ndivide()\n")
    (folder / "ends.py").write_text("import os\nos._exit(3)\n")
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))


@pytest.fixture(scope="module")
def own(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A module of the caller's, which may be edited."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "preloaded_own.py").write_text("VALUE = 'first'\n")
    sys.path.insert(0, str(folder))
    yield folder / "preloaded_own.py"
    sys.path.remove(str(folder))


@pytest.fixture(scope="module")
def told() -> Iterator[list[str]]:
    """The warnings of the pool."""
    texts: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: texts.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("skyward.cluster.cluster")
    logger.addHandler(handler)
    yield texts
    logger.removeHandler(handler)


@pytest.fixture(scope="module")
def warm(installed: Path, own: Path, told: list[str]) -> Iterator[sky.ComputePool]:
    image = sky.Image(preload=["sklearn.ensemble", "preloaded_own", "early"])
    printed.clear()
    with sky.ComputePool("local", concurrency=2, image=image, display="quiet", on_event=_note) as pool:
        yield pool


printed: list[str] = []
"""What calls have printed."""


def _note(event: sky.SkywardEvent) -> None:
    if isinstance(event, sky.events.LogLine):
        printed.append(event.line)


def _early() -> tuple[int, int, str]:
    early: Any = sys.modules["early"]
    return os.getpid(), early.PID, early.READ


def test_modules_are_imported_once_for_all_slots(warm: sky.ComputePool) -> None:
    (one, first, read), (two, second, _) = sky.compute(_early)() @ warm.slots

    assert len({one, two, first}) == 3
    assert first == second
    assert read == ""  # not a byte of what is for the agent


def test_what_modules_print_is_in_the_agents_log_once(warm: sky.ComputePool) -> None:
    sky.compute(print)("by a call") @ warm.slots
    wait_until(lambda: len(printed) >= 2)

    log = Path(warm.cluster.folder, "agent.log").read_text()

    assert log.count("early is imported") == 1
    assert set(printed) == {"by a call"}


def test_a_module_that_starts_threads_is_warned_of(warm: sky.ComputePool, told: list[str]) -> None:
    assert [text for text in told if "importing early starts threads" in text]
    assert not [text for text in told if "importing sklearn" in text]  # OpenBLAS has threads too, and ends them


def test_libraries_have_the_threads_of_a_slot(warm: sky.ComputePool) -> None:
    def threads() -> set[int]:
        import threadpoolctl

        return {int(os.environ["OMP_NUM_THREADS"]), *(pool["num_threads"] for pool in threadpoolctl.threadpool_info())}

    assert sky.compute(threads)() @ warm.slots == ({max(1, dask.system.CPU_COUNT // 2)},) * 2


def test_parallel_code_of_scikit_learn_runs_in_slots(warm: sky.ComputePool) -> None:
    def score() -> float:
        from sklearn.datasets import load_iris
        from sklearn.ensemble import HistGradientBoostingClassifier

        x, y = load_iris(return_X_y=True)
        return float(HistGradientBoostingClassifier(max_iter=5).fit(x, y).score(x, y))

    assert min(sky.compute(score)() @ warm.slots) > 0.9


def test_slots_have_different_random_numbers(warm: sky.ComputePool) -> None:
    def numbers() -> tuple[float, float]:
        import random

        import numpy as np

        return random.random(), float(np.random.rand())

    one, two = sky.compute(numbers)() @ warm.slots

    assert len({*one, *two}) == 4


def test_an_own_module_that_is_edited_is_imported_anew(warm: sky.ComputePool, own: Path) -> None:
    def value() -> str:
        import preloaded_own  # type: ignore[import-not-found]

        return str(preloaded_own.VALUE)

    assert sky.compute(value)() @ warm.slots == ("first",) * 2
    own.write_text("VALUE = 'second'\n")
    assert sky.compute(value)() @ warm.slots == ("second",) * 2


@pytest.mark.parametrize(
    ("module", "told", "last"),
    [
        ("no_such_module", "no_such_module can't be imported: ModuleNotFoundError", "No module named 'no_such_module'"),
        ("raises", "raises can't be imported: ZeroDivisionError", "in divide"),
        ("ends", "one of these modules ended the process that imports them", ""),
    ],
)
def test_a_module_that_cant_be_imported_fails_the_start(installed: Path, module: str, told: str, last: str) -> None:
    image = sky.Image(preload=["json", module])

    with pytest.raises(sky.BootstrapError, match=re.escape(told)) as caught, sky.ComputePool(image=image):
        pass

    assert last in "\n".join(caught.value.last_lines)


def test_a_module_that_initialises_cuda_is_refused(tmp_path: Path) -> None:
    (tmp_path / "device").touch()
    (tmp_path / "uses_cuda.py").write_text(f"device = open({str(tmp_path / 'device')!r})\n")
    code = (
        "from skyward.worker import warm_parent\n"
        f"warm_parent._CUDA = {str(tmp_path / 'device')!r}\n"
        "warm_parent.load()\n"
        "print(warm_parent._error)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "SKYWARD_PRELOAD": "json uses_cuda"}

    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)

    assert "importing uses_cuda initialises CUDA" in done.stdout


def test_a_parent_of_workers_that_is_started_again_imports_the_same(tmp_path: Path) -> None:
    code = (
        "from multiprocessing import forkserver\n"
        "from distributed.utils import get_mp_context\n"
        "from skyward.node import dask_processes\n"
        "from skyward.node.config import AgentConfig\n"
        "forkserver.ensure_running = lambda: None\n"
        f"config = AgentConfig('feed0001', {str(tmp_path)!r}, 60, '', '', '', preload=('json',))\n"
        "dask_processes.start_forkserver(config)\n"
        "dask_processes.DaskProcesses(config, None).configure()\n"
        "get_mp_context()\n"
        "print(forkserver._forkserver._preload_modules)\n"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert "'skyward.node.adoption'" in done.stdout
    assert "'skyward.node.image_modules'" in done.stdout
