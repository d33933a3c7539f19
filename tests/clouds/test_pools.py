"""Pools on every cloud, through its own SDK, on machines that boot: what works, and what happens when things fail.

The names of the tests are those of the table in docs/reliability.md.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from sklearn.datasets import load_digits
from sklearn.model_selection import GridSearchCV
from sklearn.naive_bayes import GaussianNB
from sklearn.svm import SVC

import skyward as sky
from skyward.cleanup import journal
from tests.clouds.emulated import Emulated
from tests.machines.conftest import IMAGE
from tests.waiting import wait_until

pytestmark = pytest.mark.slow


def open_pool(cloud: Emulated, **options: Any) -> sky.ComputePool:
    return sky.ComputePool(
        **{"provider": cloud.provider(), "machine": cloud.type, "image": IMAGE, "display": "quiet", **options}
    )


def assert_nothing_left(cloud: Emulated) -> None:
    assert cloud.left() == []
    assert journal.entries() == []


@sky.compute
def add(a: int, b: int) -> int:
    return a + b


@sky.compute
def host() -> str:
    import socket

    return socket.gethostname()


# --- what works ---------------------------------------------------------------------------------------------


def test_the_first_example_of_the_readme_runs(cloud: Emulated) -> None:
    @sky.pool(provider=cloud.provider(), machine=cloud.type, nodes=2, image=IMAGE, display="quiet")
    def main() -> tuple[Any, ...]:
        one = add(1, 2) >> sky
        pair = (add(1, 1) & add(2, 2)) >> sky
        many = sky.gather(*[add(i, i) for i in range(20)]) >> sky
        every = host() @ sky
        return one, pair, many, every

    one, pair, many, every = main()

    assert one == 3
    assert pair == (2, 4)
    assert many == tuple(2 * i for i in range(20))
    assert len(set(every)) == 2
    assert socket.gethostname() not in every
    assert_nothing_left(cloud)


def test_a_grid_search_runs_on_a_scikit_learn_pool(cloud: Emulated) -> None:
    X, y = load_digits(return_X_y=True)
    grid = {"C": [1, 10], "gamma": [0.0005, 0.001]}
    serial = GridSearchCV(SVC(), grid, cv=3).fit(X, y)

    with sky.integrations.ScikitLearnPool(
        provider=cloud.provider(), machine=cloud.type, nodes=2, concurrency=2, image=IMAGE, display="quiet"
    ) as pool:
        workers = pool.client.scheduler_info(n_workers=-1)["workers"]
        parallel = GridSearchCV(SVC(), grid, cv=3, n_jobs=-1).fit(X, y)

    assert len(workers) == 4
    assert all(address.startswith("tls://10.77.") for address in workers)
    assert parallel.best_params_ == serial.best_params_
    np.testing.assert_array_equal(parallel.cv_results_["mean_test_score"], serial.cv_results_["mean_test_score"])
    assert_nothing_left(cloud)


def test_the_meter_and_the_clouds_own_bill_agree_to_the_cent(cloud: Emulated) -> None:
    told: list[sky.CostFinal] = []

    with open_pool(cloud, nodes=2, allocation=0.5 if cloud.name != "digitalocean" else "on-demand") as pool:
        pool.on(sky.CostFinal, told.append)
        add(1, 1) >> pool
        running = pool.cost

    (final,) = told
    assert 0 < running <= final.total_cost == pool.cost
    assert final.total_cost == pytest.approx(cloud.bill(), abs=0.005)
    assert final.spot_count + final.ondemand_count == 2


def test_an_executor_and_several_pools_run(cloud: Emulated) -> None:
    first, second = open_pool(cloud), open_pool(cloud)
    with sky.MultiPool(first, second) as (a, b):
        assert host() >> a != host() >> b
    with sky.Executor(provider=cloud.provider(), machine=cloud.type, image=IMAGE, display="quiet") as executor:
        assert list(executor.map(pow, [2, 3], [3, 2])) == [8, 9]

    assert_nothing_left(cloud)


def test_pools_are_found_and_ended_from_another_computer(
    cloud: Emulated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from click.testing import CliRunner

    from skyward.cli import main

    here = os.environ["SKYWARD_DATA_DIR"]
    with open_pool(cloud):
        monkeypatch.setenv("SKYWARD_DATA_DIR", str(tmp_path / "elsewhere"))
        listed = json.loads(CliRunner().invoke(main, ["ps", "--json"]).stdout)
        expired = CliRunner().invoke(main, ["down", "--expired"])
        ended = CliRunner().invoke(main, ["down", listed[0]["pool"], "--yes"])
        monkeypatch.setenv("SKYWARD_DATA_DIR", here)
        assert cloud.machines() == []

    assert [p["provider"] for p in listed] == [cloud.name]
    assert listed[0]["owner"]["name"]
    assert "no expired pools" in expired.output
    assert ended.exit_code == 0, ended.output
    assert_nothing_left(cloud)


# --- the fault matrix ---------------------------------------------------------------------------------------


def test_no_capacity(cloud: Emulated) -> None:
    cloud.refuse_creates()
    failures: list[sky.Error] = []

    with pytest.raises((sky.CapacityError, sky.AllProvidersFailedError)) as info, open_pool(
        cloud, nodes=2, on_event=lambda e: failures.append(e) if isinstance(e, sky.Error) else None
    ):
        pass

    assert cloud.type in str(info.value)
    assert failures
    assert_nothing_left(cloud)


def test_no_capacity_in_one_region_is_found_in_another(cloud: Emulated) -> None:
    cloud.sell_out()
    several = {"regions": [cloud.region, "us-west-2"], "region": None} if cloud.name == "aws" else {"region": None}

    with open_pool(cloud, provider=cloud.provider(**several), nodes=2) as pool:
        assert add(1, 1) >> pool == 2
        assert {i.metadata["region"] for i in pool.instances}.isdisjoint({cloud.region})

    assert_nothing_left(cloud)


def test_partial_capacity(cloud: Emulated) -> None:
    cloud.have_only(2)

    with pytest.raises((sky.CapacityError, sky.AllProvidersFailedError)), open_pool(
        cloud, nodes=3, allocation="on-demand"
    ):
        pass

    assert_nothing_left(cloud)


def test_throttled(cloud: Emulated) -> None:
    cloud.throttle(3)

    with open_pool(cloud, nodes=2) as pool:
        assert len(host() @ pool) == 2

    assert_nothing_left(cloud)


def test_lost_create_answer(cloud: Emulated) -> None:
    cloud.lose_create_answer()

    with open_pool(cloud, nodes=2, allocation="on-demand") as pool:
        assert len(set(host() @ pool)) == 2
        assert len(cloud.machines()) == 2

    assert_nothing_left(cloud)


def test_slow_boot(cloud: Emulated) -> None:
    cloud.rack.boot_delay_s = 6.0

    with open_pool(cloud, nodes=2) as pool:
        assert len(host() @ pool) == 2
        for machine in cloud.rack.machines.values():  # theirs, unlike a host's, may be stopped
            assert "stop apt-daily.timer" in machine.run("cat /tmp/skyward-*/bootstrap.sh")

    assert_nothing_left(cloud)


def test_bad_user_data(cloud: Emulated, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine boots, and is not the one that is expected: it never got its keys."""
    monkeypatch.setattr("skyward.providers.base.UserData.cloud_config", lambda self: "#cloud-config\n{}")
    monkeypatch.setattr("skyward.providers.base.UserData.script", lambda self: "#!/bin/sh\nexit 1\n")

    pool = open_pool(cloud, nodes=2, boot_timeout=4)
    with pytest.raises(sky.BootstrapError, match=r"no login within 4 s.*raise boot_timeout=") as info, pool:
        pass

    assert info.value.step == "boot"
    assert ("lets SSH in from 127.0.0.1/32 alone" in str(info.value)) == (cloud.name != "verda")  # has no firewall
    assert_nothing_left(cloud)


def test_one_bad_machine(emulate: Callable[..., Emulated], baked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One machine of two never lets anybody in: another one takes its place."""
    cloud = emulate("digitalocean", baked=baked)
    boot, names = cloud.rack.boot, []

    def boot_first_badly(name: str, user_data: str, *args: Any) -> str:
        names.append(name)
        return boot(name, user_data if len(names) > 1 else "#cloud-config\n{}", *args)

    monkeypatch.setattr(cloud.rack, "boot", boot_first_badly)
    told: list[Any] = []

    with open_pool(cloud, nodes=2, boot_timeout=10, on_event=told.append) as pool:
        assert len(set(host() @ pool)) == 2
        assert len(cloud.machines()) == 2
        cost = pool.cost

    assert [e.node for e in told if isinstance(e, sky.InstanceReplaced)] == [0]
    assert any("no login within 10 s" in e.message for e in told if isinstance(e, sky.Error))
    (final,) = [e for e in told if isinstance(e, sky.CostFinal)]
    assert final.total_cost >= cost > 0
    assert final.ondemand_count == 3
    assert_nothing_left(cloud)


def test_api_down_at_terminate(cloud: Emulated) -> None:
    told: list[sky.Error] = []
    with open_pool(cloud) as pool:
        pool.on(sky.Error, told.append)
        add(1, 1) >> pool
        cloud.break_end(True)

    assert "may still run and cost money" in told[-1].message
    assert [e.state for e in journal.entries()] == ["stopping"]
    cloud.break_end(False)
    wait_until(lambda: not journal.entries(), 60)  # the guardian
    assert cloud.left() == []


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_during_the_create_call(cloud: Emulated, times: int) -> None:
    # Whoever started these tests in the background has made them deaf to it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    main = threading.main_thread().ident
    assert main is not None
    timers = [threading.Timer(0.03 + 0.1 * n, signal.pthread_kill, [main, signal.SIGINT]) for n in range(times)]

    def interrupt(event: sky.InstanceLaunching) -> None:
        while timers:
            timers.pop().start()

    pool = open_pool(cloud, nodes=2)
    pool.on(sky.InstanceLaunching, interrupt)

    with pytest.raises(KeyboardInterrupt), pool:
        pass

    if times == 1:
        assert_nothing_left(cloud)
    wait_until(lambda: cloud.left() == [], 60)  # after a second one the guardian does it


def test_spot_reclaim_mid_task(cloud: Emulated) -> None:
    """A machine is taken away while it works: the job ends as if nothing had happened."""
    replaced: list[sky.InstanceReplaced] = []
    lost: list[sky.InstanceLost] = []

    @sky.compute
    def slow(i: int) -> int:

        time.sleep(1.5)
        return i * i

    provisioned: list[sky.InstanceProvisioned] = []
    with open_pool(cloud, nodes=2, retries=0) as pool:
        pool.on(sky.InstanceProvisioned, provisioned.append)
        pool.on(sky.InstanceReplaced, replaced.append)
        pool.on(sky.InstanceLost, lost.append)
        victim = pool.instances[1]
        futures = [pool.submit(slow(i)) for i in range(16)]
        wait_until(lambda: sum(f.done() for f in futures) >= 2, 60)
        cloud.take_away(victim.id)

        assert [f.result(120) for f in futures] == [i * i for i in range(16)]
        wait_until(lambda: replaced, 90)
        wait_until(lambda: len(pool.instances) == 2, 90)
        assert len(host() @ pool) == 2

    assert [e.instance_id for e in lost] == [victim.id]
    assert [e.replaced_id for e in replaced] == [victim.id]
    assert [e.node for e in provisioned] == [e.node for e in replaced]
    assert_nothing_left(cloud)


def traced() -> Any:
    """Return an estimator that notes each fit on its machine, with the time at which it ended."""

    class Traced(GaussianNB):
        def fit(self, X: Any, y: Any) -> Any:
            name = f"{self.var_smoothing!r}/{len(X)}/{X.sum():.0f}"
            with Path("/tmp/fits").open("a") as fits:
                print(f"{name} 0", file=fits, flush=True)
                time.sleep(0.5)
                super().fit(X, y)
                print(f"{name} {time.time()}", file=fits)
            return self

    return Traced()


@pytest.fixture
def fits(cloud: Emulated, monkeypatch: pytest.MonkeyPatch) -> list[list[tuple[str, float]]]:
    """The fits on each machine that was destroyed, in the order of that: begun at 0, or when they ended."""
    found: list[list[tuple[str, float]]] = []
    destroy = cloud.rack.destroy

    def read_and_destroy(name: str) -> None:
        if (machine := cloud.rack.machines.get(name)) is not None:
            lines = machine.run("cat /tmp/fits 2>/dev/null; true").splitlines()
            found.append([(fit, float(ended)) for fit, ended in map(str.split, lines)])
        destroy(name)

    monkeypatch.setattr(cloud.rack, "destroy", read_and_destroy)
    return found


@pytest.mark.parametrize(
    ("cloud", "nodes"), [("aws", 1), ("aws", 3), ("digitalocean", 1), ("verda", 1)], indirect=["cloud"]
)
def test_scheduler_machine_reclaimed_mid_search(
    cloud: Emulated, nodes: int, fits: list[list[tuple[str, float]]]
) -> None:
    X, y = load_digits(return_X_y=True)
    has_notice = cloud.name == "aws"
    grid = {"var_smoothing": np.logspace(-9, 0, (20 if has_notice else 8) * nodes)}
    serial = GridSearchCV(GaussianNB(), grid, cv=2, refit=False).fit(X, y)
    moved: list[sky.SchedulerMoved] = []
    progress: list[tuple[int, float]] = []
    allocation = "on-demand" if cloud.name == "digitalocean" else "always-spot"  # which DigitalOcean does not have
    opening = open_pool(cloud, nodes=nodes, concurrency=2, retries=0, allocation=allocation)

    with opening as pool, ThreadPoolExecutor(1) as threads:
        pool.on(sky.SchedulerMoved, moved.append)
        pool.on(sky.TaskProgress, lambda event: progress.append((event.done, time.time())))
        victim = pool.instances[0].id

        def take_away() -> float:
            wait_until(lambda: progress and progress[-1][0] >= 2 * nodes, 60)
            cloud.take_away(victim, notice_s=30)
            return time.time()

        taking = threads.submit(take_away)
        with sky.integrations.joblib_backend(pool):
            found = GridSearchCV(traced(), grid, cv=2, n_jobs=-1, refit=False).fit(X, y)
        taken_at = taking.result(60)

    np.testing.assert_array_equal(found.cv_results_["mean_test_score"], serial.cv_results_["mean_test_score"])
    assert [event.node for event in moved] == [1]
    assert_nothing_left(cloud)
    begun = [fit for machine in fits for fit, ended in machine if not ended]
    assert len(set(begun)) == 2 * len(grid["var_smoothing"])
    if has_notice:  # what the machine has begun has ended there
        finished = {fit for machine in fits for fit, ended in machine if 0 < ended < taken_at}
        assert [fit for fit in {*finished, *(fit for fit, _ in fits[0])} if begun.count(fit) > 1] == []
    times = [at for (before, _), (done, at) in pairwise([(0, 0.0), *progress]) if done > before]
    pause = max(later - earlier for earlier, later in pairwise(times) if later > taken_at)
    print(f"{cloud.name}, nodes={nodes}: {pause:.1f} s without progress, {len(begun) - len(set(begun))} fits ran again")


# --- a client that is killed --------------------------------------------------------------------------------

CLIENT = """
import os, sys, time
import skyward as sky
from skyward.spec import pool as spec
from tests.clouds.emulated import TYPES, _REGIONS
from tests.machines.conftest import IMAGE

spec.LEAST_HEARTBEAT_TIMEOUT_S = 6
name, until = sys.argv[1:]

def tell(event):
    if type(event).__name__ == until:
        print(type(event).__name__, flush=True)
        if until != "PoolStarted":
            time.sleep(600)

options = {"machine": TYPES[name], "image": IMAGE, "heartbeat_timeout": 6, "display": "quiet", "on_event": tell}
with sky.ComputePool(name, nodes=2, **options):
    time.sleep(600)
"""


@pytest.fixture
def client(cloud: Emulated, tmp_path: Path) -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    """Starts a program that opens a pool, and returns it when the event with this name has come."""
    script = tmp_path / "client.py"
    script.write_text(textwrap.dedent(CLIENT))
    started: list[subprocess.Popen[str]] = []

    def start(until: str) -> subprocess.Popen[str]:
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        process = subprocess.Popen(
            [sys.executable, str(script), cloud.name, until], stdout=subprocess.PIPE, text=True, env=environment
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline().strip() == until
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
    for guardian in guardians():
        guardian.kill()


def guardians() -> list[psutil.Process]:
    folder = os.environ["SKYWARD_DATA_DIR"]
    found = []
    for process in psutil.process_iter():
        try:
            if "skyward.cleanup.guardian" in process.cmdline() and process.environ().get("SKYWARD_DATA_DIR") == folder:
                found.append(process)
        except psutil.Error:
            pass
    return found


@pytest.mark.parametrize("when", ["InstanceProvisioned", "PoolStarted"])
def test_client_killed_after_launch(
    when: str, cloud: Emulated, client: Callable[[str], subprocess.Popen[str]]
) -> None:
    process = client(when)
    assert len(cloud.machines()) == 2

    process.kill()

    wait_until(lambda: cloud.machines() == [], 60)
    wait_until(lambda: cloud.left() == [], 60)


def test_client_and_guardian_killed(cloud: Emulated, client: Callable[[str], subprocess.Popen[str]]) -> None:
    """Nobody is left: machines switch themselves off, which ends them on AWS, and elsewhere they wait for `down`."""
    from click.testing import CliRunner

    from skyward.cli import main

    process = client("PoolStarted")
    for guardian in guardians():
        guardian.kill()
    process.kill()

    wait_until(lambda: not cloud.rack.machines, 60)  # all are off
    (entry,) = journal.entries()
    ended = CliRunner().invoke(main, ["down", entry.pool_id])

    assert ended.exit_code == 0, ended.output
    assert_nothing_left(cloud)


SUSPENDED = """
import sys
import skyward as sky
from skyward.spec import pool as spec
from tests.machines.conftest import IMAGE

spec.LEAST_HEARTBEAT_TIMEOUT_S = 3
with sky.ComputePool("aws", machine=sys.argv[1], image=IMAGE, heartbeat_timeout=3, display="quiet") as pool:
    print("up", flush=True)
    input()
    try:
        sky.compute(int)() >> pool
    except sky.PoolError as exc:
        print(exc)
"""


@pytest.mark.parametrize("cloud", ["aws"], indirect=True)
def test_a_suspended_client_is_told_that_its_machines_are_gone_for_that(cloud: Emulated) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SUSPENDED, cloud.type], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"

        process.send_signal(signal.SIGSTOP)
        wait_until(lambda: cloud.machines() == [], 60)
        process.send_signal(signal.SIGCONT)
        output, _ = process.communicate("\n", timeout=120)

    assert "this process was suspended or could not send heartbeats for" in output
    assert_nothing_left(cloud)
