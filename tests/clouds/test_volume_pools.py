"""Buckets as folders of a pool's machines, with what the machines' own role may do."""

from __future__ import annotations

import os
import pickle
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import boto3
import pytest

import skyward as sky
from skyward.cleanup import end, journal
from skyward.cluster import cluster as cluster_module
from skyward.cluster import flush, remote
from skyward.scripts import volumes
from skyward.spec import pool as spec
from tests.clouds.emulated import Emulated
from tests.machines.conftest import IMAGE
from tests.slow_proxy import SlowProxy, slow_proxy
from tests.waiting import wait_until

pytestmark = pytest.mark.slow


@pytest.fixture
def cloud(emulate: Callable[..., Emulated], baked: Path) -> Emulated:
    return emulate("aws", baked=baked)


def test_a_pool_reads_and_writes_a_bucket_and_loses_nothing_at_its_end(cloud: Emulated) -> None:
    s3 = boto3.client("s3")
    s3.create_bucket(Bucket="data")
    s3.put_object(Bucket="data", Key="in/greeting", Body=b"hello")
    where = cloud.cloud.url_for_machines
    volumes = [
        sky.S3Volume("/data/in", "data", "in/", endpoint_url=where),
        sky.S3Volume("/data/out", "data", "out/", read_only=False, endpoint_url=where),
    ]

    @sky.compute
    def copy() -> str:
        text = Path("/data/in/greeting").read_text()
        Path("/data/out/answer").write_text(text.upper())
        try:
            Path("/data/in/not").write_text("")
        except OSError as exc:
            return str(exc)
        return "written"

    with sky.ComputePool(
        cloud.provider(), machine=cloud.type, image=IMAGE, volume=volumes, display="quiet"
    ) as pool:
        refused = copy() >> pool

    assert "Read-only file system" in refused
    assert s3.get_object(Bucket="data", Key="out/answer")["Body"].read() == b"HELLO"
    assert cloud.left() == []


@sky.compute
def train(folder: Path, epochs: int) -> tuple[int, int]:
    """Add up the numbers of its epochs, from the checkpoint on; one that begins without it hangs in the middle."""
    folder.mkdir(parents=True, exist_ok=True)
    state, first, total = folder / "state", 0, 0
    if state.exists():
        first, total = pickle.loads(state.read_bytes())
    for epoch in range(first, epochs):
        total += epoch
        state.with_suffix(".part").write_bytes(pickle.dumps((epoch + 1, total)))
        state.with_suffix(".part").replace(state)
        if first == 0 and epoch == epochs // 2:
            print("waits to be taken away")
            time.sleep(600)
    return first, total


def test_a_training_goes_on_from_its_checkpoint_on_a_new_machine(cloud: Emulated) -> None:
    """As docs/distributed-training.md shows it, with one spot machine, which is taken away before it has uploaded."""
    boto3.client("s3").create_bucket(Bucket="data")
    volume = sky.S3Volume("/data", "data", read_only=False, endpoint_url=cloud.cloud.url_for_machines)
    lines: list[sky.LogLine] = []
    failures: list[sky.MachineLostError] = []
    opening = sky.ComputePool(
        cloud.provider(), machine=cloud.type, allocation="always-spot", image=IMAGE, volume=volume, display="quiet"
    )

    with opening as pool, ThreadPoolExecutor(1) as threads:
        pool.on(sky.LogLine, lines.append)
        (first,) = pool.instances

        def train_to_the_end() -> tuple[tuple[int, int], ...]:
            for _attempt in range(5):
                try:
                    return train(Path("/data/run-7"), 20) @ pool
                except sky.MachineLostError as exc:
                    failures.append(exc)
            return ()

        running = threads.submit(train_to_the_end)
        wait_until(lambda: lines, 60)
        cloud.take_away(first.id)

        assert running.result(120) == ((11, sum(range(20))),)
        assert [machine.id for machine in pool.instances] != [first.id]

    assert len(failures) == 1
    assert cloud.left() == []
    assert journal.entries() == []


def test_a_bucket_that_does_not_exist_is_told_and_nothing_is_left(cloud: Emulated) -> None:
    volume = sky.S3Volume("/data", "missing-bucket", endpoint_url=cloud.cloud.url_for_machines)

    with pytest.raises(sky.BootstrapError, match=r"'missing-bucket'.* does not exist"), sky.ComputePool(
        cloud.provider(), machine=cloud.type, image=IMAGE, volume=volume, display="quiet"
    ):
        pass

    assert cloud.left() == []


# --- the last writes ----------------------------------------------------------------------------------------

SIZE = 4_000_000


@sky.compute
def save(name: str, size: int = SIZE) -> int:
    """Write a file that is only sent when the call has ended."""
    return Path("/out", name).write_bytes(os.urandom(size))


class Bucket:
    """A bucket behind a network whose speed can be set, and a volume in it."""

    def __init__(self, proxy: SlowProxy, url: str) -> None:
        self.proxy = proxy
        self.client = boto3.client("s3")
        self.client.create_bucket(Bucket="out")
        self.volume = sky.S3Volume("/out", "out", "run", read_only=False, endpoint_url=url)

    def sizes(self) -> dict[str, int]:
        return {o["Key"]: o["Size"] for o in self.client.list_objects_v2(Bucket="out").get("Contents", [])}


@pytest.fixture
def bucket(cloud: Emulated) -> Iterator[Bucket]:
    host, _, port = cloud.cloud.url_for_machines.rpartition(":")
    with slow_proxy(int(port), host.removeprefix("http://")) as (proxy, slow_port):
        yield Bucket(proxy, f"{host}:{slow_port}")


def pool_on(cloud: Emulated, bucket: Bucket, **options: Any) -> sky.ComputePool:
    return sky.ComputePool(
        cloud.provider(), machine=cloud.type, image=IMAGE, volume=bucket.volume, display="quiet", **options
    )


def test_last_writes_arrive_however_long_they_take(
    cloud: Emulated, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster_module, "CLOSE_S", 2.0)
    monkeypatch.setattr(remote, "_TELL_FLUSH_S", 1.0)
    events: list[sky.SkywardEvent] = []

    with pool_on(cloud, bucket, nodes=2, on_event=events.append) as pool:
        bucket.proxy.rate = 2e6
        save("first") >> pool
        save("second") @ pool  # node 1, which leaves, has it too
        pool.scale(1)

    assert bucket.sizes() == {"run/first": SIZE, "run/second": SIZE}
    told = [e.step for e in events if isinstance(e, sky.BootstrapProgress) and e.step.startswith("sending")]
    assert told
    assert all(step.startswith("sending /out: ") and step.endswith("B left") for step in told)
    assert not [e for e in events if isinstance(e, sky.Error)]
    assert cloud.left() == []


def test_an_error_names_what_could_not_be_sent(
    cloud: Emulated, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(volumes, "STALLED_S", 2)
    events: list[sky.SkywardEvent] = []

    def run() -> None:
        with pool_on(cloud, bucket, on_event=events.append) as pool:
            bucket.client.delete_bucket(Bucket="out")
            save("result", 100_000) >> pool

    with pytest.raises(sky.VolumeError) as caught:
        run()

    error = caught.value
    (machine,) = (e for e in events if isinstance(e, sky.InstanceProvisioned))
    assert (error.mount_path, error.volume, error.files, error.bytes) == ("/out", "s3://out/run", 1, 100_000)
    assert error.machine == f"node 0 ({machine.instance_id})"
    assert str(error).startswith(
        f"node 0 ({machine.instance_id}) could not send 100 kB in 1 file, written to /out, for s3://out/run: "
    )
    assert "NoSuchBucket" in str(error)
    (told,) = [e for e in events if isinstance(e, sky.Error)]
    assert told.instance_id == machine.instance_id
    assert str(error) in told.message
    assert cloud.left() == []


def test_an_error_of_the_block_is_not_hidden_by_unsent_data(
    cloud: Emulated, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(volumes, "STALLED_S", 1)

    def run() -> None:
        with pool_on(cloud, bucket) as pool:
            bucket.client.delete_bucket(Bucket="out")
            save("result", 1000) >> pool
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run()


def test_after_ctrl_c_while_data_is_sent_the_guardian_goes_on(
    cloud: Emulated, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "_TELL_FLUSH_S", 1.0)
    errors: list[str] = []

    def interrupt(event: sky.SkywardEvent) -> None:
        if isinstance(event, sky.BootstrapProgress) and event.step.startswith("sending") and not errors:
            errors.append("interrupted")
            os.kill(os.getpid(), signal.SIGINT)
        if isinstance(event, sky.Error):
            errors.append(event.message)

    def run() -> None:
        with pool_on(cloud, bucket, on_event=interrupt) as pool:
            bucket.proxy.rate = 1e6
            save("result") >> pool

    with pytest.raises(KeyboardInterrupt):
        run()

    assert bucket.sizes() == {}
    assert len(cloud.rack.machines) == 1
    assert "the pool's guardian continues" in errors[-1]
    wait_until(lambda: cloud.left() == [], 60)
    assert bucket.sizes() == {"run/result": SIZE}
    wait_until(lambda: not journal.entries(), 60)


def test_a_machine_without_its_caller_sends_before_it_ends(
    cloud: Emulated, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spec, "LEAST_HEARTBEAT_TIMEOUT_S", 4.0)
    told: list[sky.SkywardEvent] = []
    with pool_on(cloud, bucket, heartbeat_timeout=4, on_event=told.append) as pool:
        bucket.proxy.rate = 1e6
        save("result") >> pool
        (agent,) = pool.cluster._agents
        # As if nobody were there.
        pool.cluster.loop.add_callback(agent._beating.cancel)
        agent._heartbeats._loop.call_soon_threadsafe(agent._heartbeat._task.cancel)

        wait_until(lambda: not cloud.rack.machines, 60)

        assert bucket.sizes() == {"run/result": SIZE}
        wait_until(lambda: any(isinstance(e, sky.Error) and "/out" in e.message for e in told), 60)


def test_a_pool_that_is_ended_from_outside_sends_its_data(
    cloud: Emulated, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flush, "SILENT_S", 6.0)
    monkeypatch.setattr(remote, "_STOP_S", 2.0)

    def run() -> None:
        with pool_on(cloud, bucket) as pool:
            bucket.proxy.rate = 1e6
            save("result") >> pool
            (entry,) = journal.entries()

            assert end.end_pool(entry) == []

            assert bucket.sizes() == {"run/result": SIZE}

    with pytest.raises(sky.VolumeError, match="may not have sent all"):  # its owner does not know
        run()
    assert cloud.left() == []
