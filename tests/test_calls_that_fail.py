"""What becomes of calls that raise, exit, die, or carry what can't travel."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import sys
import threading
import time
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import skyward as sky
from skyward.transfer import pickling


@sky.compute
def double(x: int) -> int:
    return 2 * x


class OwnError(Exception):
    def __init__(self, code: int) -> None:
        super().__init__(f"code {code}")
        self.code = code

    def __reduce__(self) -> Any:
        return OwnError, (self.code,)


class UnpicklableError(Exception):
    def __init__(self, lock: Any) -> None:
        super().__init__("holds a lock")
        self.lock = lock


# --- exceptions ---------------------------------------------------------------------------------------------


def test_the_users_own_exception_comes_back_with_traceback_and_machine(pool: sky.ComputePool) -> None:
    def inner() -> None:
        raise OwnError(7)

    @sky.compute
    def outer() -> None:
        inner()

    with pytest.raises(OwnError) as info:
        outer() >> pool

    assert info.value.code == 7
    assert isinstance(info.value.__cause__, sky.RemoteTraceback)
    assert "in inner" in str(info.value.__cause__)
    assert "in outer" in str(info.value.__cause__)
    assert "run_batch" not in str(info.value.__cause__)
    assert any("node" in note and "process" in note for note in info.value.__notes__)
    assert "in inner" in "".join(traceback.format_exception(info.value))


def test_a_recursion_without_end_comes_back_as_such(pool: sky.ComputePool) -> None:
    def forever(n: int) -> int:
        return forever(n + 1)

    with pytest.raises(RecursionError):
        sky.compute(forever)(0) >> pool


def test_a_batch_raises_its_first_failure_in_order_and_drops_the_rest(
    pool: sky.ComputePool, tmp_path: Path
) -> None:
    @sky.compute
    def work(i: int) -> None:
        if i in (3, 5):
            raise OwnError(i)
        (tmp_path / str(i)).touch()
        time.sleep(0.05)

    with pytest.raises(OwnError) as info:
        sky.gather(*(work(i) for i in range(1000))) >> pool

    assert info.value.code in (3, 5)
    assert len(list(tmp_path.iterdir())) < 500


def test_a_stream_raises_in_its_turn_and_keeps_what_came_before(pool: sky.ComputePool) -> None:
    @sky.compute
    def work(i: int) -> int:
        if i == 5:
            raise OwnError(i)
        return i

    got = []
    with pytest.raises(OwnError):
        got.extend(sky.gather((work(i) for i in range(100)), stream=True) >> pool)

    results = sky.gather((work(i) for i in range(100)), stream=True) >> pool
    assert [next(results) for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(OwnError):
        next(results)


def test_an_exception_group_arrives_as_a_group(pool: sky.ComputePool) -> None:
    def several() -> None:
        raise ExceptionGroup("both", [ValueError("a"), OwnError(1)])

    with pytest.raises(ExceptionGroup, match="both") as info:
        sky.compute(several)() >> pool

    assert [type(e) for e in info.value.exceptions] == [ValueError, OwnError]


def test_the_cause_inside_the_task_is_shown(pool: sky.ComputePool) -> None:
    def chained() -> None:
        try:
            _ = {}["missing"]  # type: ignore[var-annotated]
        except KeyError as exc:
            raise OwnError(1) from exc

    with pytest.raises(OwnError) as info:
        sky.compute(chained)() >> pool

    assert "KeyError: 'missing'" in str(info.value.__cause__)


# --- what can't travel --------------------------------------------------------------------------------------


def test_an_argument_that_cannot_be_pickled_is_named(pool: sky.ComputePool) -> None:
    @sky.compute
    def train(x: int, lock: Any = None) -> None: ...

    with pytest.raises(sky.SerializationError, match=r"argument 'lock' of .*train\(\)"):
        train(1, threading.Lock()) >> pool
    with pytest.raises(sky.SerializationError, match=r"argument 'lock' of .*train\(\)"):
        train(1, lock=threading.Lock()) @ pool
    with socket.socket() as open_socket, pytest.raises(sky.SerializationError, match="argument 'x'"):
        train({"deep": [open_socket]}) >> pool  # type: ignore[arg-type]


def test_a_captured_variable_that_cannot_be_pickled_is_named(pool: sky.ComputePool) -> None:
    guard = threading.Lock()

    @sky.compute
    def train() -> bool:
        return guard.locked()

    with pytest.raises(sky.SerializationError, match="guard"):
        train() >> pool


def test_one_call_of_a_batch_that_cannot_travel_spoils_no_pool(pool: sky.ComputePool) -> None:
    train = sky.compute(lambda x: None)

    with pytest.raises(sky.SerializationError):
        sky.gather(train(1), train(threading.Lock()), train(2)) >> pool

    assert double(1) >> pool == 2


def test_a_result_that_cannot_be_pickled_is_named(pool: sky.ComputePool) -> None:
    @sky.compute
    def make() -> Any:
        return threading.Lock()

    with pytest.raises(sky.SerializationError, match=r"make\(\) returned a _thread\.lock, which can't be sent back"):
        make() >> pool


def test_a_result_that_cannot_be_unpickled_here_says_so(pool: sky.ComputePool) -> None:
    @sky.compute
    def make() -> Any:
        import sys
        import types

        module = sys.modules["only_there"] = types.ModuleType("only_there")
        module.Thing = type("Thing", (), {"__module__": "only_there"})  # type: ignore[attr-defined]
        return module.Thing()  # type: ignore[attr-defined]

    with pytest.raises(sky.SerializationError, match="only_there"):
        make() >> pool


def test_an_unpicklable_exception_arrives_as_text_with_its_traceback(pool: sky.ComputePool) -> None:
    @sky.compute
    def fail() -> None:
        raise UnpicklableError(threading.Lock())

    with pytest.raises(sky.SerializationError, match="UnpicklableError: holds a lock") as info:
        fail() >> pool

    assert "in fail" in str(info.value.__cause__)


class TwoArgumentsError(Exception):
    def __init__(self, a: int, *, b: int) -> None:
        super().__init__(f"{a} and {b}")
        self.b = b


def test_an_exception_that_would_not_unpickle_comes_back_nevertheless(pool: sky.ComputePool) -> None:
    @sky.compute
    def fail() -> None:
        raise TwoArgumentsError(1, b=2)

    with pytest.raises(TwoArgumentsError, match="1 and 2") as info:
        fail() >> pool

    assert info.value.b == 2


# --- exits and deaths ---------------------------------------------------------------------------------------


def test_sys_exit_in_a_call_is_an_error_with_its_code_and_harms_nobody(pool: sky.ComputePool) -> None:
    before = set(sky.compute(os.getpid)() @ pool.slots)

    with pytest.raises(sky.TaskExitError, match="3") as info:
        sky.compute(sys.exit)(3) >> pool

    assert info.value.code == 3  # type: ignore[attr-defined]
    assert set(sky.compute(os.getpid)() @ pool.slots) == before


@pytest.mark.parametrize("how", ["exit", "kill", "segfault"])
def test_a_call_that_kills_its_process_fails_and_the_pool_recovers(how: str) -> None:
    @sky.compute
    def die() -> None:
        if how == "exit":
            os._exit(3)
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        import ctypes

        ctypes.string_at(0)

    with sky.ComputePool(provider="local", nodes=1, concurrency=2, display="quiet", retries=1) as pool:
        with pytest.raises(sky.WorkerDiedError, match=r"die\(\) was lost with its worker process 2 times") as info:
            die() >> pool

        assert info.value.losses == 2  # type: ignore[attr-defined]
        assert isinstance(info.value, sky.MachineLostError)
        assert sky.gather(*(double(i) for i in range(20))) >> pool == tuple(range(0, 40, 2))
        assert len(set(sky.compute(os.getpid)() @ pool.slots)) == 2


def test_calls_that_were_beside_a_killer_are_run_again_and_none_is_lost(tmp_path: Path) -> None:
    @sky.compute
    def work(i: int) -> int:
        if i == 50 and not (tmp_path / "died").exists():
            (tmp_path / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return i

    with sky.ComputePool(provider="local", nodes=2, concurrency=2, display="quiet") as pool:
        assert sky.gather(*(work(i) for i in range(500))) >> pool == tuple(range(500))


def test_one_killer_among_many_fails_alone(tmp_path: Path) -> None:
    @sky.compute
    def work(i: int) -> int:
        if i == 20:
            os._exit(1)
        return i

    with sky.ComputePool(provider="local", nodes=1, concurrency=2, display="quiet", retries=1) as pool:
        outcomes = sky.gather(*(work(i) for i in range(60)), return_exceptions=True) >> pool

    assert isinstance(outcomes[20], sky.WorkerDiedError)
    assert [o for i, o in enumerate(outcomes) if i != 20] == [i for i in range(60) if i != 20]


def test_a_lost_broadcast_ends_the_other_parts_and_is_told() -> None:
    @sky.compute
    def work() -> None:
        info = sky.instance_info()
        assert info is not None
        if info.node == 1:
            os._exit(1)
        time.sleep(60)

    with sky.ComputePool(provider="local", nodes=2, display="quiet") as pool:
        began = time.monotonic()
        with pytest.raises(sky.MachineLostError, match=r"broadcast of .*work"):
            work() @ pool

        assert time.monotonic() - began < 30
        assert sky.compute(lambda: 1)() @ pool == (1, 1)


def test_a_cancelled_call_that_costs_its_worker_loses_no_other_calls() -> None:
    with sky.ComputePool(provider="local", nodes=1, concurrency=1, display="quiet", retries=0) as pool:
        stuck = pool.submit(sky.compute(time.sleep)(60))
        while not stuck.running():
            time.sleep(0.01)
        fine = [pool.submit(double(i)) for i in range(5)]
        stuck.cancel()

        assert [f.result(timeout=60) for f in fine] == [0, 2, 4, 6, 8]


def test_a_cancelled_call_leaves_no_half_imported_package_behind(tmp_path: Path) -> None:
    package, started = tmp_path / "slow_to_import", tmp_path / "started"
    package.mkdir()
    (package / "part.py").write_text("value = 7")
    (package / "__init__.py").write_text(
        f"import time, slow_to_import.part\nopen({str(started)!r}, 'w').close()\n"
        "for _ in range(100):\n    time.sleep(0.01)"
    )

    @sky.compute
    def use() -> tuple[int, int]:
        import slow_to_import  # type: ignore[import-not-found]

        return slow_to_import.part.value, os.getpid()

    env = {"PYTHONPATH": str(tmp_path)}
    with sky.ComputePool(provider="local", display="quiet", env=env) as pool:
        before = sky.compute(os.getpid)() >> pool
        future = pool.submit(use())
        while not started.exists():
            time.sleep(0.01)
        future.cancel()

        assert use() >> pool == (7, before)


def test_a_part_that_raises_ends_the_others(pool: sky.ComputePool) -> None:
    @sky.compute
    def work() -> None:
        info = sky.instance_info()
        assert info is not None
        if info.node == 0:
            raise OwnError(4)
        time.sleep(60)

    began = time.monotonic()
    with pytest.raises(OwnError):
        work() @ pool

    assert time.monotonic() - began < 20
    assert double(1) >> pool == 2


# --- the errors themselves ----------------------------------------------------------------------------------


def test_every_error_survives_pickling_with_its_facts() -> None:
    errors = [v for n in sky.__all__ if isinstance(v := getattr(sky, n), type) and issubclass(v, sky.SkywardError)]

    for error in errors:
        again = pickle.loads(pickle.dumps(error("what happened", option="nodes", value=0)))
        assert type(again) is error
        assert str(again) == "what happened"
        assert again.option == "nodes"

    assert len(errors) > 15


def test_a_category_of_warnings_travels_without_its_module(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("only_here_warnings")
    category = type("Odd", (Warning,), {"__module__": module.__name__})
    module.Odd = category  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    sent, _ = pickling.dumps([category, DeprecationWarning])

    monkeypatch.delitem(sys.modules, module.__name__)
    found, other = pickle.loads(sent)

    assert issubclass(found, Warning)
    assert found is not category
    assert other is DeprecationWarning
