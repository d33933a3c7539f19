"""What happens to a pool and its calls when parts of it are killed or cut off."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

import skyward as sky
from skyward.cluster import remote, ssh
from skyward.cluster.listing import Listing
from skyward.providers import base
from skyward.spec import pool as spec
from tests.cloudbox import Machine
from tests.machines.conftest import IMAGE, Site
from tests.waiting import wait_until

Boot = Callable[..., list[Machine]]
AGENT = "skyward.node.agen[t]"  # as a pattern, which does not find its own command line


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let seconds be enough to give a machine up."""
    monkeypatch.setattr(remote, "UNREACHABLE_S", 3.0)
    monkeypatch.setattr(remote, "_STOP_S", 3.0)
    monkeypatch.setattr(ssh, "_KEEPALIVE_S", 1)


@pytest.fixture
def data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A journal of the test's own. Guardians that still try to reach a machine end with the test."""
    folder = tmp_path / "data"
    monkeypatch.setenv("SKYWARD_DATA_DIR", str(folder))
    yield folder
    for guardian in guardians(folder):
        guardian.kill()


def open_pool(site: Site, machines: list[Machine], **options: Any) -> sky.ComputePool:
    return sky.ComputePool(site.provider(*machines), nodes=len(machines), image=IMAGE, display="quiet", **options)


@sky.compute
def slow(i: int) -> tuple[int, str]:
    import pathlib
    import socket

    with pathlib.Path("/tmp/runs").open("a") as runs:
        runs.write(f"{i}\n")
    time.sleep(0.1)
    return i, socket.gethostname()


def runs(machine: Machine) -> list[str]:
    return machine.run("cat /tmp/runs 2>/dev/null; true").split()


def kill_agent(machine: Machine) -> None:
    machine.run(f"pkill -KILL -f {AGENT}")


def is_clean(machine: Machine) -> bool:
    return not machine.processes() and not machine.run("ls -d /tmp/skyward-* 2>/dev/null; true")


def guardians(data_folder: Path) -> list[psutil.Process]:
    entries = [path.stem for path in data_folder.glob("pools/*.json")]
    return [
        p
        for p in psutil.process_iter(["cmdline"])
        if "skyward.cleanup.guardian" in (p.info["cmdline"] or ()) and p.info["cmdline"][-1] in entries
    ]


# --- nodes --------------------------------------------------------------------------------------------------


def cut_off(machine: Machine) -> None:
    machine.unplug()


def destroy(machine: Machine) -> None:
    machine.destroy()


def freeze_agent(machine: Machine) -> None:
    machine.run(f"pkill -STOP -f {AGENT}")


@pytest.mark.usefixtures("impatient", "data_folder")
@pytest.mark.parametrize(
    ("fault", "node"),
    [(kill_agent, 0), (cut_off, 0), (destroy, 0), (freeze_agent, 0), (cut_off, 1), (freeze_agent, 1)],
)
def test_calls_of_a_lost_node_run_again_elsewhere(
    fault: Callable[[Machine], None], node: int, site: Site, boot: Boot
) -> None:
    machines = boot(2)
    lost: list[sky.InstanceLost] = []
    moved: list[sky.SchedulerMoved] = []

    with open_pool(site, machines, concurrency=2) as pool:
        pool.on(sky.InstanceLost, lost.append)
        pool.on(sky.SchedulerMoved, moved.append)
        results = []
        for i, _ in sky.gather((slow(i) for i in range(60)), stream=True) >> pool:
            results.append(i)
            if i == 10:
                fault(machines[node])
        wait_until(lambda: lost, 60)
        survivors = {host for _, host in sky.gather(*(slow(i) for i in range(4))) >> pool}

    assert results == list(range(60))
    assert [(e.node, e.instance_id) for e in lost] == [(node, f"root@{machines[node].address}")]
    assert [e.node for e in moved] == ([] if node else [1])
    assert survivors == {machines[1 - node].name}
    assert is_clean(machines[1 - node])


@pytest.mark.usefixtures("impatient", "data_folder")
@pytest.mark.parametrize("node", [0, 1])
def test_a_broadcast_says_that_a_machine_can_not_be_reached(node: int, site: Site, boot: Boot) -> None:
    machines = boot(2)

    @sky.compute
    def wait() -> None:
        time.sleep(300)

    with open_pool(site, machines) as pool:
        cutting = threading.Timer(1, cut_off, [machines[node]])
        cutting.start()
        with pytest.raises(sky.MachineLostError, match="was lost") as caught:
            wait() @ pool

        assert slow(1) >> pool == (1, machines[1 - node].name)
    assert "out of memory" not in str(caught.value)


@pytest.mark.usefixtures("impatient", "data_folder")
def test_a_spare_host_takes_the_place_of_the_only_one(site: Site, boot: Boot) -> None:
    machines = boot(2)
    replaced: list[sky.InstanceReplaced] = []

    provider = site.provider(*machines)
    with sky.ComputePool(provider, image=IMAGE, display="quiet") as pool:
        pool.on(sky.InstanceReplaced, replaced.append)
        found = []
        for i, host in sky.gather((slow(i) for i in range(20)), stream=True) >> pool:
            found.append((i, host))
            if i == 5:
                destroy(machines[0])

    assert [i for i, _ in found] == list(range(20))
    assert found[-1][1] == machines[1].name
    assert [e.replaced_id for e in replaced] == [f"root@{machines[0].address}"]
    assert is_clean(machines[1])


@pytest.mark.usefixtures("data_folder")
def test_a_killed_worker_is_restarted_and_its_call_rerun(site: Site, boot: Boot) -> None:
    (machine,) = boot(1)

    @sky.compute
    def die_once() -> str:
        import pathlib

        marker = pathlib.Path("died")
        if not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return "alive"

    with open_pool(site, [machine]) as pool:
        assert die_once() >> pool == "alive"


@pytest.mark.usefixtures("data_folder")
def test_a_cut_connection_is_made_again_without_running_anything_twice(site: Site, boot: Boot) -> None:
    (machine,) = boot(1)

    with open_pool(site, [machine]) as pool:
        (agent,) = pool.cluster._agents
        results = []
        for i, _ in sky.gather((slow(i) for i in range(30)), stream=True) >> pool:
            results.append(i)
            if i in (5, 15):
                pool.cluster.loop.add_callback(agent.link.drop)

    assert results == list(range(30))
    assert sorted(map(int, runs(machine))) == results


@pytest.mark.usefixtures("data_folder")
def test_a_network_that_comes_back_loses_nothing(
    site: Site, boot: Boot, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ssh, "_KEEPALIVE_S", 1)
    (machine,) = boot(1)

    with open_pool(site, [machine]) as pool:
        plug = threading.Timer(5, machine.plug)
        results = []
        for i, _ in sky.gather((slow(i) for i in range(40)), stream=True) >> pool:
            results.append(i)
            if i == 5:
                machine.unplug()
                plug.start()

    assert results == list(range(40))
    assert sorted(map(int, runs(machine))) == results


@pytest.mark.usefixtures("data_folder")
def test_a_cloud_that_does_not_answer_keeps_no_pool_from_its_machines(
    site: Site, boot: Boot, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ssh, "_KEEPALIVE_S", 1)
    monkeypatch.setattr(remote, "_ASK_S", 2.0)
    (machine,) = boot(1)
    asked, answer = threading.Event(), threading.Event()

    def gone(_: Sequence[base.Machine]) -> set[str]:
        asked.set()
        answer.wait(120)
        return set()

    with open_pool(site, [machine]) as pool:
        (agent,) = pool.cluster._agents
        agent._listing = Listing(gone)
        machine.unplug()
        call = pool.submit(slow(1))
        assert asked.wait(60)
        machine.plug()
        try:
            wait_until(lambda: agent._writer is not None)
            assert call.result(60) == (1, machine.name)
        finally:
            answer.set()


@pytest.mark.usefixtures("data_folder", "impatient")
def test_a_machine_is_tried_once_more_after_its_cloud_has_let_us_in(
    site: Site, boot: Boot, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "_ASK_S", 2.0)
    (machine,) = boot(1)

    def gone(_: Sequence[base.Machine]) -> set[str]:
        time.sleep(remote.UNREACHABLE_S + 1)  # a slow API
        machine.plug()  # as a firewall does that lets in a caller whose address has changed
        return set()

    with open_pool(site, [machine]) as pool:
        pool.cluster._agents[0]._listing = Listing(gone)
        machine.unplug()
        assert slow(1) >> pool == (1, machine.name)


@pytest.mark.usefixtures("data_folder")
def test_a_command_that_is_lost_with_the_connection_is_given_again(
    site: Site, boot: Boot, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ssh, "_KEEPALIVE_S", 1)
    machines = boot(2)
    send = remote.RemoteAgent.send

    def cut_and_send(agent: remote.RemoteAgent, command: dict[str, Any]) -> None:
        if command["do"] == "join":
            machines[1].unplug()
            threading.Timer(5, machines[1].plug).start()
        send(agent, command)

    monkeypatch.setattr(remote.RemoteAgent, "send", cut_and_send)

    with open_pool(site, machines) as pool:
        assert pool.instance_count == 2


@pytest.mark.usefixtures("data_folder")
def test_a_large_argument_is_sent_again_after_its_worker_is_lost(site: Site, boot: Boot) -> None:
    import numpy as np

    machines = boot(2)
    array = np.ones(400_000)
    total = sky.compute(lambda a: int(a.sum()))

    with open_pool(site, machines) as pool:
        assert total(array) >> pool == 400_000
        for machine, pid in zip(machines, sky.compute(os.getpid)() @ pool, strict=True):
            machine.run(f"kill -KILL {pid}")  # one of them has the copy that the others take theirs from
            assert total(array) >> pool == 400_000


@pytest.mark.usefixtures("data_folder")
def test_a_large_argument_lies_once_on_each_machine(site: Site, boot: Boot, tmp_path: Path) -> None:
    import numpy as np

    machines = boot(3)
    array = np.arange(9_000_000, dtype=np.int64)  # 72 MB: in several pieces

    @sky.compute
    def total(a: Any) -> tuple[int, bool]:
        return int(a.sum()), bool(a.flags.writeable)

    with open_pool(site, machines, concurrency=2) as pool:
        assert total(array) @ pool.slots == ((int(array.sum()), False),) * 6
        assert sky.gather(*(total(array) for _ in range(12))) >> pool == ((int(array.sum()), False),) * 12
        assert sky.gather(*(total(array[::2]) for _ in range(6))) >> pool == ((int(array[::2].sum()), False),) * 6
        assert sky.gather(*(sky.compute(len)(bytes(2_000_000)) for _ in range(6))) >> pool == (2_000_000,) * 6
        for machine in machines:
            sizes = {int(size) for size in machine.run("stat -c %s /tmp/skyward-*/buffer-files/*").split()}
            assert array.nbytes in sizes
            assert sizes <= {array.nbytes, array.nbytes // 2, 2_000_000}  # calls may not have run on all machines

        file = np.memmap(tmp_path / "file", np.int64, "w+", shape=10)
        assert total(file) >> pool == (0, False)
        with pytest.raises(ValueError, match="read-only"):
            sky.compute(np.ndarray.fill)(file, 1) >> pool


@pytest.mark.usefixtures("data_folder")
def test_unneeded_arguments_leave_machines_without_a_further_call(site: Site, boot: Boot) -> None:
    import numpy as np

    (machine,) = boot(1)
    total = sky.compute(lambda a: int(a[0]))

    with open_pool(site, [machine]) as pool:
        pool.engine.store._keep_bytes = 5 << 20
        assert sum(sky.gather(*(total(np.full(250_000, i)) for i in range(20))) >> pool) == 190  # 2 MB each

        wait_until(lambda: len(machine.run("ls /tmp/skyward-*/buffer-files").split()) <= 3)


@pytest.mark.usefixtures("data_folder")
def test_a_large_argument_without_room_is_an_error_and_the_pool_goes_on(site: Site, boot: Boot) -> None:
    import numpy as np

    (machine,) = boot(1, disk="200m")
    total = sky.compute(lambda a: int(a.sum()))

    with open_pool(site, [machine]) as pool:
        with pytest.raises(sky.PoolError, match=r"argument of 320 MB can't be kept on .*: No space left"):
            total(np.ones(40_000_000)) >> pool
        assert total(np.ones(200_000)) >> pool == 200_000


@pytest.mark.usefixtures("data_folder")
def test_a_pool_leaves_nothing_in_shared_memory(site: Site, boot: Boot) -> None:
    machines = boot(1)

    with open_pool(site, machines, concurrency=2) as pool:
        assert slow(1) >> pool
        assert not list(Path("/dev/shm").glob(f"skyward-{pool.cluster.name}-*"))

    wait_until(lambda: machines[0].run("ls /dev/shm") == "", timeout_s=10)


@pytest.mark.usefixtures("data_folder")
def test_a_machine_cut_off_before_its_agent_runs_cleans_itself(
    site: Site, boot: Boot, impatient: None, data_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spec, "LEAST_HEARTBEAT_TIMEOUT_S", 4.0)
    (machine,) = boot(1)
    # As another pool that is just being prepared there: ours waits, and is not further than that.
    machine.run("setsid flock /root/.cache/skyward/lock sleep 600 > /dev/null 2>&1 & sleep 0.1")
    pool = open_pool(site, [machine], heartbeat_timeout=4)

    def cut_off(event: sky.BootstrapProgress) -> None:
        if event.step == "wait":
            machine.unplug()

    pool.on(sky.BootstrapProgress, cut_off)
    with pytest.raises(sky.BootstrapError, match="'wait'"), pool:
        pass

    wait_until(lambda: "skyward-" not in machine.run("ls /tmp"), 60)
    assert not [line for line in machine.processes() if "skyward" in line and "flock" not in line]


def test_a_pool_grows_and_shrinks(site: Site, boot: Boot) -> None:
    machines = boot(2)

    with sky.ComputePool(site.provider(*machines), nodes=1, image=IMAGE, display="quiet") as pool:
        assert pool.instance_count == 1
        pool.scale(2)
        wait_until(lambda: pool.instance_count == 2, 60)
        assert len(set(sky.compute(os.uname)() @ pool)) == 2
        pool.scale(1)
        wait_until(lambda: pool.instance_count == 1, 60)
        wait_until(lambda: is_clean(machines[1]), 60)
        pool.scale(2)
        wait_until(lambda: pool.instance_count == 2, 60)

    assert all(map(is_clean, machines))


# --- the caller ---------------------------------------------------------------------------------------------


@pytest.fixture
def client(site: Site, boot: Boot, data_folder: Path) -> Iterator[tuple[subprocess.Popen[str], list[Machine]]]:
    """A process with a pool on two machines, in the middle of a call that runs for long."""
    machines = boot(2)
    hosts = [f"root@{m.address}" for m in machines]
    script = f"""
        import time
        import skyward as sky
        from skyward.spec import pool as spec
        from skyward.spec.image import Image

        spec.LEAST_HEARTBEAT_TIMEOUT_S = 8
        provider = sky.SSH({hosts!r}, key={str(site.key)!r}, known_hosts={str(site.known_hosts)!r})

        @sky.compute
        def work():
            import subprocess
            subprocess.run(["setsid", "sleep", "1000"])

        image = Image(pip={list(IMAGE.pip)!r})
        with sky.ComputePool(provider, nodes=2, image=image, heartbeat_timeout=8, display="quiet") as pool:
            pool.submit(work())
            time.sleep(1)
            print("up", flush=True)
            time.sleep(1000)
    """
    environment = {**os.environ, "SKYWARD_DATA_DIR": str(data_folder)}
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    yield process, machines
    process.kill()
    process.wait()
    process.stdout.close()


Client = tuple[subprocess.Popen[str], list[Machine]]


@pytest.mark.usefixtures("data_folder")
def test_a_suspended_caller_is_told_what_its_machines_did(site: Site, boot: Boot, tmp_path: Path) -> None:
    """It has two pools on a machine, one of which allows for a longer suspension."""
    (machine,) = boot(1)
    script = f"""
        import os, time
        import skyward as sky
        from skyward.spec import pool as spec

        spec.LEAST_HEARTBEAT_TIMEOUT_S = 1
        provider = sky.SSH("root@{machine.address}", key={str(site.key)!r}, known_hosts={str(site.known_hosts)!r})
        options = {{"image": sky.Image(pip={list(IMAGE.pip)!r}), "display": "quiet", "retries": 0}}
        with (
            sky.ComputePool(provider, heartbeat_timeout=8, **options) as pool,
            sky.ComputePool(provider, heartbeat_timeout=60, **options) as patient,
        ):
            before = sky.compute(os.getpid)() >> patient
            running = pool.submit(sky.compute(time.sleep)(1000))
            print(pool.cluster.name, flush=True)
            input()
            print(running.exception(), flush=True)
            try:
                sky.compute(os.getpid)() >> pool
            except sky.PoolError as exc:
                print(exc, flush=True)
            print(before == sky.compute(os.getpid)() >> patient, flush=True)
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        name = process.stdout.readline().strip()
        assert name

        process.send_signal(signal.SIGSTOP)
        wait_until(lambda: name not in machine.run("ls /tmp"), 60)
        process.send_signal(signal.SIGCONT)
        output, _ = process.communicate("\n", timeout=60)

    running, later, is_alive = output.splitlines()
    told = rf"pool {name} has ended: this process was suspended or could not send heartbeats for \d+ s "
    told += r"\(limit heartbeat_timeout=8 s\), so its machines shut themselves down"
    assert re.match(told, running)
    assert re.match(told, later)
    assert is_alive == "True"


def test_a_killed_caller_is_cleaned_up_after_by_its_guardian(client: Client, data_folder: Path) -> None:
    process, machines = client
    assert not any(map(is_clean, machines))

    process.kill()

    wait_until(lambda: all(map(is_clean, machines)), timeout_s=7)  # before the agents do so themselves
    wait_until(lambda: not list(data_folder.glob("pools/*")), 60)


def test_machines_clean_themselves_when_caller_and_guardian_are_gone(client: Client, data_folder: Path) -> None:
    process, machines = client
    (guardian,) = guardians(data_folder)

    guardian.kill()
    process.kill()

    wait_until(lambda: all(map(is_clean, machines)), 60)
    assert len(list(data_folder.glob("pools/*.json"))) == 1  # `skyward ps` still shows it


def test_a_terminated_caller_ends_its_pool_first(client: Client, data_folder: Path) -> None:
    process, machines = client

    process.terminate()

    assert process.wait(30) == 128 + signal.SIGTERM
    assert all(map(is_clean, machines))
    assert not list(data_folder.glob("pools/*"))
