"""A pool's life: entered, used, left in every way there is, and what it shows of itself."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import io
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import psutil
import pytest

import skyward as sky
from skyward.current import current_pool
from skyward.session.session import Session
from tests.waiting import wait_until


@sky.compute
def double(x: int) -> int:
    return 2 * x


@sky.compute
def pid() -> int:
    return os.getpid()


def small(**options: Any) -> sky.ComputePool:
    return sky.ComputePool(provider="local", display="quiet", **options)


# --- life ---------------------------------------------------------------------------------------------------


def test_building_a_pool_starts_nothing() -> None:
    before = len(psutil.Process().children(recursive=True))

    pool = small(nodes=3)

    assert not pool.is_active
    assert pool.instance_count == 0
    assert len(psutil.Process().children(recursive=True)) == before
    assert "not active" in repr(pool)


def test_a_pool_is_gone_after_its_block_and_can_be_entered_again() -> None:
    pool = small()
    pids = set()

    for _ in range(2):
        with pool:
            assert pool.is_active
            pids.add(pid() >> pool)
            assert double(2) >> pool == 4
        assert not pool.is_active
        wait_until(lambda: not any(psutil.pid_exists(p) for p in pids))

    assert len(pids) == 2


def test_a_pool_used_after_its_block_says_so() -> None:
    pool = small()
    with pool:
        future = pool.submit(double(1))
        assert future.result() == 2

    for use in (lambda: double(1) >> pool, lambda: double(1) @ pool, lambda: pool.client, lambda: pool.dashboard_link):
        with pytest.raises(sky.NoActivePoolError, match="only inside its `with` block"):
            use()


def test_a_pool_that_is_still_starting_says_so() -> None:
    pool, said = small(accelerator="A100:9"), []

    def use(_: Any) -> None:
        said.append(pool.instances)
        for part in ("engine", "client", "cluster"):
            try:
                getattr(pool, part)
            except sky.NoActivePoolError as exc:
                said.append(str(exc).partition(":")[0])

    pool.on(sky.InfraCreating, use)
    with pytest.raises(sky.NoMatchingInstanceError):
        pool.start()

    assert said == [(), *["this pool is still starting"] * 3]


def test_what_a_pool_is_made_of_says_what_it_is() -> None:
    session = Session(small(nodes=2).spec, sky.Local(), (), print)
    with small(nodes=2) as pool:
        shown = [repr(pool), repr(session), repr(pool.engine), *map(repr, pool.cluster._agents)]

    assert shown == [
        "<ComputePool active: 2 nodes × 1 slot on local>",
        f"<Session {session.pool_id}: 2 nodes × 1 slot on local>",
        "<Engine: 0 chunks in flight, 0 groups with calls that wait>",
        "<LocalAgent of nodes [0, 1]>",
    ]
    assert repr(sky.MultiPool(pool)) == "MultiPool(<ComputePool not active: 2 nodes × 1 slot on local>)"
    assert repr(sky.Executor("local")) == "<Executor on <ComputePool not active: 1 node × 1 slot on local>>"


def test_entering_an_active_pool_is_refused_and_harms_nothing() -> None:
    with small() as pool:
        with pytest.raises(sky.PoolError, match="already active"):
            pool.__enter__()
        assert double(1) >> pool == 2


def test_start_and_close_do_what_entering_and_leaving_do() -> None:
    pool = small().start()
    there = psutil.Process(pid() >> sky)

    pool.close()
    pool.close()

    wait_until(lambda: not there.is_running())
    assert not pool.is_active
    assert current_pool() is not pool


def test_a_pool_that_is_never_closed_ends_with_the_program() -> None:
    script = """
        import os
        import skyward as sky
        sky.ComputePool(display="quiet").start()
        print(sky.compute(os.getpid)() >> sky)
    """

    ran = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=60)

    assert ran.returncode == 0, ran.stderr
    wait_until(lambda: not psutil.pid_exists(int(ran.stdout)))


def test_an_exception_in_the_block_ends_the_pool_and_passes_through() -> None:
    pool = small()

    with pytest.raises(ZeroDivisionError), pool:  # noqa: PT012 - the block is what is tested
        there = pid() >> pool
        _ = 1 / 0

    assert not pool.is_active
    wait_until(lambda: not psutil.pid_exists(there))


def test_nothing_is_left_in_the_shared_folder() -> None:
    with small() as pool:
        assert sky.compute(len)(b"x" * (4 << 20)) >> pool == 4 << 20
        pool_id = pool.cluster.name

    assert not list(Path("/dev/shm").glob(f"skyward-{pool_id}-*"))


def test_async_with_works_too() -> None:
    async def main() -> int:
        async with small():
            return await asyncio.to_thread(lambda: double(3) >> sky)

    assert asyncio.run(main()) == 6


def test_calls_that_wait_when_the_block_ends_are_told() -> None:
    with small() as pool:
        futures = [pool.submit(sky.compute(time.sleep)(30)) for _ in range(3)]

    for future in futures:
        with pytest.raises(sky.PoolError, match="closed"):
            future.result(timeout=10)


def test_the_timeout_ends_everything() -> None:
    pool = small(timeout=15)

    with pool:
        there = pid() >> pool
        with pytest.raises(sky.PoolTimeoutError, match=r"timeout of 15 s has passed") as info:
            sky.compute(time.sleep)(60) >> pool
        wait_until(lambda: not psutil.pid_exists(there))
        with pytest.raises(sky.PoolTimeoutError):
            double(1) >> pool

    assert isinstance(info.value, TimeoutError)


def test_an_idle_pool_ends_itself_but_a_busy_one_does_not() -> None:
    with small(idle_timeout=1) as pool:
        sky.compute(time.sleep)(2) >> pool
        assert pool.is_active
        wait_until(lambda: not pool.is_active)
        with pytest.raises(sky.PoolTimeoutError, match="idle_timeout of 1 s"):
            double(1) >> pool


def test_env_and_image_env_reach_the_workers() -> None:
    image = sky.Image(env={"A": "image", "B": "image"})

    with small(image=image, env={"B": "pool"}) as pool:
        found = sky.compute(lambda: (os.environ["A"], os.environ["B"]))() >> pool

    assert found == ("image", "pool")


# --- @sky.pool ----------------------------------------------------------------------------------------------


def test_the_decorator_brings_a_pool_around_the_body() -> None:
    @sky.pool("local", nodes=2, display="quiet")
    def main(x: int) -> tuple[int, tuple[int, ...]]:
        return double(x) >> sky, sky.compute(lambda: 1)() @ sky

    assert main(4) == (8, (1, 1))
    assert main.__name__ == "main"


def test_the_decorator_works_on_coroutines() -> None:
    @sky.pool(display="quiet")
    async def main(x: int) -> int:
        return await asyncio.to_thread(lambda: double(x) >> sky)

    assert inspect.iscoroutinefunction(main)
    assert asyncio.run(main(4)) == 8


def test_the_decorator_finds_bad_options_where_they_are_written() -> None:
    with pytest.raises(sky.SpecError, match="nodes=0"):
        sky.pool(nodes=0)


def test_the_decorator_without_parentheses_is_explained() -> None:
    with pytest.raises(TypeError, match=r"@sky\.pool needs parentheses"):

        @sky.pool
        def main() -> None: ...


def test_every_option_of_a_pool_is_one_of_the_decorator() -> None:
    from skyward.pool import PoolOptions

    options = set(inspect.signature(sky.ComputePool).parameters) - {"provider"}

    assert set(PoolOptions.__annotations__) == options


def test_nested_pools_the_innermost_is_current() -> None:
    with small(env={"WHICH": "outer"}), small(env={"WHICH": "inner"}):
        which = sky.compute(lambda: os.environ["WHICH"])

        assert which() >> sky == "inner"
        seen: list[str] = []
        thread = threading.Thread(target=lambda: seen.append(which() >> sky))
        thread.start()
        thread.join()
        assert seen == ["inner"]


def test_two_pools_in_two_contexts_do_not_mix() -> None:
    which = sky.compute(lambda: os.environ["WHICH"])

    def block(name: str, found: list[str], both: threading.Barrier) -> None:
        with small(env={"WHICH": name}):
            both.wait(60)
            found.append(which() >> sky)
            both.wait(60)

    found: list[list[str]] = [[], []]
    both = threading.Barrier(2)
    threads = [
        threading.Thread(target=contextvars.Context().run, args=(block, name, found[i], both))
        for i, name in enumerate("ab")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert found == [["a"], ["b"]]


# --- submit and map -----------------------------------------------------------------------------------------


def test_submit_gives_a_future_with_callbacks(pool: sky.ComputePool) -> None:
    called = threading.Event()

    future = pool.submit(double(5))
    future.add_done_callback(lambda f: called.set())

    assert future.result(timeout=30) == 10
    assert called.wait(10)


def test_submit_takes_arguments_as_they_are_now(pool: sky.ComputePool) -> None:
    items = [1, 2]
    future = pool.submit(sky.compute(sum)(items))
    items.append(100)

    assert future.result(timeout=30) == 3


def test_cancelling_a_future_ends_a_running_call(pool: sky.ComputePool, tmp_path: Path) -> None:
    started, finished = tmp_path / "started", tmp_path / "finished"

    @sky.compute
    def work() -> None:
        started.touch()
        for _ in range(3000):
            time.sleep(0.01)
        finished.touch()

    future = pool.submit(work())
    wait_until(started.exists)

    assert future.cancel()
    assert future.cancelled()
    assert sky.gather(*(double(i) for i in range(20))) >> pool == tuple(range(0, 40, 2))
    assert not finished.exists()


def test_map_streams_in_order_and_reads_little_ahead(pool: sky.ComputePool) -> None:
    read = 0

    def items() -> Any:
        nonlocal read
        for i in range(1_000_000):
            read = i
            yield i

    results = pool.map(double, items())
    first = [next(results) for _ in range(10)]
    results.close()  # type: ignore[attr-defined]

    assert first == list(range(0, 20, 2))
    assert read < 100_000
    assert list(pool.map(lambda a, b: a - b, [5, 6], [1, 2])) == [4, 4]


# --- looking in ---------------------------------------------------------------------------------------------


def test_instances_are_the_nodes(pool: sky.ComputePool) -> None:
    nodes = pool.instances

    assert pool.instance_count == 2
    assert [n.node for n in nodes] == [0, 1]
    assert nodes[0].is_head
    assert not nodes[1].is_head
    assert nodes[0].private_ip == "127.0.0.1"
    assert pool.total_slots == 4


def test_repr_in_a_notebook_is_html(pool: sky.ComputePool) -> None:
    shown = pool._repr_html_()

    assert "<b>ComputePool</b> · active · 2 nodes × 2 slots on local" in shown
    assert f'<a href="{pool.dashboard_link}" target="_blank">dashboard</a>' in shown
    assert all(f">{instance.id}</td>" in shown for instance in pool.instances)
    assert shown.count(">ready</td>") == 2
    assert "USD so far" not in shown  # it costs nothing
    assert small()._repr_html_() == "<div><p><b>ComputePool</b> · not active · 1 node × 1 slot on local</p></div>"


def test_repr_in_a_notebook_tells_of_what_is_not_there(pool: sky.ComputePool, monkeypatch: pytest.MonkeyPatch) -> None:
    first, *_ = pool.cluster.slots()
    monkeypatch.setattr(pool.cluster, "slots", lambda: [first])

    shown = pool._repr_html_()

    assert "2 slots on local · 1 not there now" in shown
    assert ">1 of 2 slots ready</td>" in shown


def test_scale_adds_and_removes_nodes() -> None:
    with small(nodes=1) as pool:
        pool.scale(2)
        wait_until(lambda: pool.instance_count == 2)
        assert sky.compute(lambda: sky.instance_info().node)() @ pool == (0, 1)  # type: ignore[union-attr]
        pool.scale(1)
        wait_until(lambda: pool.instance_count == 1)
        assert double(1) >> pool == 2


def test_adapt_brings_nodes_for_waiting_calls() -> None:
    with small(nodes=1) as pool:
        pool.adapt(1, 2)
        futures = [pool.submit(sky.compute(time.sleep)(0.5)) for _ in range(12)]
        wait_until(lambda: pool.instance_count == 2)
        for future in futures:
            future.result(timeout=60)


# --- output -------------------------------------------------------------------------------------------------


def test_printed_lines_arrive_with_their_node_and_in_order() -> None:
    lines: list[sky.LogLine] = []

    def see(event: Any) -> None:
        if isinstance(event, sky.LogLine):
            lines.append(event)

    with small(nodes=2, on_event=see) as pool:
        sky.compute(lambda: [print(f"line {i}") for i in range(50)] and None)() @ pool
        wait_until(lambda: len(lines) >= 100)
        logs = pool.logs(1)

    for node in (0, 1):
        assert [e.line for e in lines if e.node == node] == [f"line {i}" for i in range(50)]
    assert logs == [f"line {i}" for i in range(50)]


def test_a_million_printed_lines_harm_nobody(pool: sky.ComputePool) -> None:
    @sky.compute
    def storm() -> str:
        for i in range(1_000_000):
            print("line", i)
        return "done"

    assert storm() >> pool == "done"
    assert double(1) >> pool == 2
    assert len(pool.logs()) <= 20_010


def test_quiet_shows_nothing_and_auto_shows_link_and_lines(capfd: pytest.CaptureFixture[str]) -> None:
    hello = sky.compute(lambda: print("hello from a worker"))

    with small() as pool:
        hello() >> pool
        wait_until(lambda: bool(pool.logs()))
    quiet = capfd.readouterr()
    with sky.ComputePool(provider="local") as pool:
        hello() >> pool
        link = pool.dashboard_link
        wait_until(lambda: bool(pool.logs()))
    loud = capfd.readouterr()

    assert quiet == ("", "")
    assert "[node 0] hello from a worker\n" in loud.out
    assert link in loud.err


def test_warnings_of_calls_are_issued_again_here(pool: sky.ComputePool) -> None:
    def warn() -> None:
        warnings.warn("mind the gap", DeprecationWarning, stacklevel=1)

    with pytest.warns(DeprecationWarning, match="mind the gap"):
        sky.compute(warn)() >> pool


def test_a_warning_that_is_an_error_here_is_the_calls_error(pool: sky.ComputePool) -> None:
    def warn() -> int:
        warnings.warn("mind the gap", RuntimeWarning, stacklevel=1)
        return 1

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeWarning, match="mind the gap"):
            sky.compute(warn)() >> pool
        with pytest.raises(RuntimeWarning, match="mind the gap"):
            pool.submit(sky.compute(warn)()).result(timeout=30)


def test_handlers_get_the_events_of_their_type() -> None:
    seen: list[Any] = []
    pool = small()
    pool.on(sky.PoolStarted, seen.append)

    with pool:
        assert [type(e) for e in seen] == [sky.PoolStarted]


# --- providers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("provider", "text"),
    [
        ("asw", "did you mean 'aws'"),
        ("locl", "did you mean 'local'"),
        ("dask", "the name alone does not say which cluster"),
        (5, "a provider such as"),
        ([], "one provider"),
    ],
)
def test_a_bad_provider_is_told_what_there_is(provider: Any, text: str) -> None:
    with pytest.raises(sky.SpecError, match=text) as info:
        sky.ComputePool(provider)

    assert info.value.option == "provider"  # type: ignore[attr-defined]


# --- Ctrl-C and kill ----------------------------------------------------------------------------------------


def _script(body: str, tmp_path: Path) -> subprocess.Popen[str]:
    path = tmp_path / "script.py"
    path.write_text(textwrap.dedent(body))
    return subprocess.Popen(
        [sys.executable, "-u", str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path
    )


def _line(stream: Any) -> str:
    assert isinstance(stream, io.TextIOBase)
    return stream.readline().strip()


def test_ctrl_c_in_a_long_gather_returns_at_once_and_keeps_the_pool(tmp_path: Path) -> None:
    process = _script(
        """
        import time
        import skyward as sky

        @sky.compute
        def work(i):
            time.sleep(0.2)
            return i

        with sky.ComputePool(provider="local", nodes=1, concurrency=2, display="quiet") as pool:
            print("ready")
            try:
                sky.gather(*(work(i) for i in range(10_000))) >> pool
            except KeyboardInterrupt:
                print("interrupted", flush=True)
            print(work(7) >> pool)
        """,
        tmp_path,
    )
    try:
        assert _line(process.stdout) == "ready"
        time.sleep(1)  # well inside the gather
        began = time.monotonic()
        process.send_signal(signal.SIGINT)

        assert _line(process.stdout) == "interrupted"
        took = time.monotonic() - began
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()

    assert took < 2
    assert out.strip() == "7"
    assert err == ""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_caller_leaves_no_process_and_no_file(how: signal.Signals, tmp_path: Path) -> None:
    process = _script(
        """
        import os, subprocess, time
        import skyward as sky

        @sky.compute
        def spawn():
            child = subprocess.Popen(["sleep", "600"])
            return [os.getpid(), child.pid]

        with sky.ComputePool(provider="local", nodes=2, concurrency=2, display="quiet") as pool:
            print(*[p for pair in spawn() @ pool.slots for p in pair])
            pool.submit(sky.compute(time.sleep)(600))
            time.sleep(600)
        """,
        tmp_path,
    )
    try:
        pids = [int(p) for p in _line(process.stdout).split()]
        family = {p.pid for p in psutil.Process(process.pid).children(recursive=True)} | set(pids)
        process.send_signal(how)
        process.wait(timeout=10)
    finally:
        process.kill()
        process.communicate()

    assert len(pids) == 8
    wait_until(lambda: not any(_lives(p) for p in family), timeout_s=10)


def _lives(number: int) -> bool:
    try:
        return psutil.Process(number).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


# --- MultiPool ----------------------------------------------------------------------------------------------


def test_several_pools_start_and_end_together() -> None:
    first, second = small(env={"WHICH": "1"}), small(env={"WHICH": "2"})
    which = sky.compute(lambda: os.environ["WHICH"])

    with sky.MultiPool(first, second) as (a, b):
        assert (which() >> a, which() >> b) == ("1", "2")

    assert not first.is_active
    assert not second.is_active


def test_one_pool_that_fails_ends_the_others_and_tells_all_causes() -> None:
    good, bad, worse = small(), small(accelerator="A100:9"), small(accelerator="H100:7")

    with (
        pytest.raises(ExceptionGroup, match="2 of 3 pools could not be started") as info,
        sky.MultiPool(good, bad, worse),
    ):
        pass

    assert [type(e) for e in info.value.exceptions] == [sky.NoMatchingInstanceError] * 2
    assert not good.is_active


def test_a_multipool_of_nothing_or_of_the_same_pool_twice_is_refused() -> None:
    pool = small()

    with pytest.raises(TypeError, match="at least one"):
        sky.MultiPool()
    with pytest.raises(TypeError, match="twice"):
        sky.MultiPool(pool, pool)
