"""The local provider: real processes that stand for nodes, with the environment that real nodes would have."""

from __future__ import annotations

import os
import re
import sys
import tempfile
import threading
import urllib.request
import zipfile
from pathlib import Path
from typing import Any

import pytest

import skyward as sky
from skyward.accelerators.devices import read_nvml
from skyward.cluster.overlay import missing, missing_wheels, overlay
from skyward.environment.wheels import read
from tests.dashboard import names_shown
from tests.environment.packages import install
from tests.nvml import FakeNvml
from tests.waiting import wait_until


def test_workers_are_named_after_node_and_slot_and_have_resources(pool: sky.ComputePool) -> None:
    pool.client.wait_for_workers(4, timeout=60)  # another test may have cost one, which is being restarted
    workers = pool.client.scheduler_info(n_workers=-1)["workers"].values()

    found = {w["name"]: w["resources"] for w in workers}

    assert found == {"0-0": {"NODE": 1.0}, "0-1": {}, "1-0": {"NODE": 1.0}, "1-1": {}}


def test_every_slot_is_a_process_of_its_own(pool: sky.ComputePool) -> None:
    assert len(set(sky.compute(os.getpid)() @ pool.slots)) == 4


def test_the_cluster_is_a_dask_cluster(pool: sky.ComputePool) -> None:
    from distributed import Client
    from distributed.deploy import Cluster

    assert isinstance(pool.cluster, Cluster)
    with Client(pool.cluster, set_as_default=False) as client:
        assert client.submit(sum, [1, 2, 3]).result(timeout=30) == 6
    assert pool.client.submit(sum, [4, 5]).result(timeout=30) == 9


def test_a_call_may_hold_the_interpreter_lock_for_as_long_as_it_likes(pool: sky.ComputePool) -> None:
    """Its worker can't answer the scheduler then, which is not to restart it for that."""
    checks = pool.client.run_on_scheduler(lambda dask_scheduler: list(dask_scheduler.periodic_callbacks))

    assert "tick" in checks
    assert "worker-ttl" not in checks


def test_nobody_without_the_certificate_gets_in(pool: sky.ComputePool) -> None:
    from distributed import Client, Security

    address = pool.cluster.scheduler_address
    assert address.startswith("tls://")
    with pytest.raises(OSError):
        Client(address.replace("tls://", "tcp://"), timeout="2s", set_as_default=False)
    own = Security.temporary()
    with pytest.raises(OSError):
        Client(address, security=own, timeout="2s", set_as_default=False)


def test_the_dashboard_answers_under_its_link(pool: sky.ComputePool) -> None:
    link = pool.dashboard_link

    with urllib.request.urlopen(link, timeout=30) as answer:
        page = answer.read().decode()

    assert link.startswith("http://127.0.0.1:")
    assert answer.status == 200
    assert "bokeh" in page.lower()


def test_tasks_carry_the_name_of_the_users_function_on_the_dashboard(pool: sky.ComputePool) -> None:
    @sky.compute
    def my_own_name() -> int:
        return 1

    my_own_name() >> pool

    wait_until(lambda: "my_own_name" in names_shown(pool.client))


def test_gpus_are_divided_among_slots() -> None:
    visible = sky.compute(lambda: os.environ.get("CUDA_VISIBLE_DEVICES"))()

    with sky.ComputePool(
        sky.Local(gpus=4), nodes=1, concurrency=2, accelerator="A100:4", display="quiet"
    ) as pool:
        assert visible @ pool.slots == ("0,1", "2,3")
        info = sky.compute(sky.instance_info)() >> pool
        workers = pool.client.scheduler_info(n_workers=-1)["workers"].values()

    assert info is not None
    assert (info.accelerator, info.accelerators, info.total_accelerators) == ("A100", 4, 4)
    assert {w["resources"]["GPU"] for w in workers} == {2.0}


def test_more_gpus_than_are_declared_are_refused_when_the_pool_is_made() -> None:
    with pytest.raises(sky.SpecError, match=r"accelerator='T4:2' is invalid: expected up to 1 per node") as info:
        sky.ComputePool(sky.Local(gpus=1), accelerator="T4:2", display="quiet")

    assert info.value.option == "accelerator"


def test_gpus_that_are_not_there_are_an_error_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    there = read_nvml(FakeNvml("t4"))
    monkeypatch.setattr("skyward.providers.local._read", lambda _: there)

    pool = sky.ComputePool("local", nodes=2, accelerator="T4", display="quiet")

    with pytest.raises(sky.NoMatchingInstanceError, match=r"2 × T4 .* asked for, 1 there: Tesla T4"):
        pool.__enter__()


def test_gpus_that_are_there_are_shared_out_among_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    there = read_nvml(FakeNvml("h100x8"))
    monkeypatch.setattr("skyward.providers.local._read", lambda _: there)

    found = [sky.Local().devices(node, 4, sky.Accelerator.parse("H100:2")) for node in range(4)]

    assert [uuid for mine in found for uuid in mine] == [device.id for device in there.devices]


@pytest.mark.parametrize("value", [-1, "2", True])
def test_declared_gpus_must_be_a_count(value: Any) -> None:
    with pytest.raises(sky.SpecError, match="gpus="):
        sky.Local(gpus=value)


def _wheel(folder: Path, name: str, version: str) -> Path:
    """Make a wheel with one module by hand: a wheel is only a zip file with three files of metadata."""
    path = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(f"{name}.py", f"VERSION = {version!r}\n")
        file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", "")
    return path


def test_packages_that_are_missing_here_come_through_an_overlay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _wheel(tmp_path, "skyward_overlay_probe", "1.2")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def version() -> str:
        import skyward_overlay_probe  # type: ignore[import-not-found]

        return str(skyward_overlay_probe.VERSION)

    image = sky.Image(pip=["skyward_overlay_probe==1.2", "dask"])
    with sky.ComputePool("local", image=image, display="quiet") as pool:
        assert sky.compute(version)() >> pool == "1.2"
    with pytest.raises(ModuleNotFoundError):
        version()


def test_a_failed_installation_raises_an_error_with_the_end_of_pips_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    pool = sky.ComputePool("local", image=sky.Image(pip=["skyward-no-such-thing"]), display="quiet")

    with pytest.raises(sky.BootstrapError, match="skyward-no-such-thing could not be installed") as info:
        pool.__enter__()

    assert info.value.step == "pip"  # type: ignore[attr-defined]
    assert any("skyward-no-such-thing" in line for line in info.value.last_lines)  # type: ignore[attr-defined]
    assert not pool.is_active
    assert not list((tmp_path / "cache").rglob("site"))


def test_what_is_installed_is_not_missing() -> None:
    wanted = ["dask", "Distributed>=1", "dask<1", "nothing-like-this", "x; python_version < '3'"]

    assert missing(wanted) == ["dask<1", "nothing-like-this"]


def test_extras_hashes_and_addresses_that_are_installed_are_not_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = {"vcs": "git", "commit_id": "0123abcd"}
    install(tmp_path, "from-git", direct_url={"url": "https://host/r.git", "vcs_info": commit})
    install(tmp_path, "more", requires=["dask; extra == 'here'", "nothing-like-this; extra == 'lacking'"])
    monkeypatch.syspath_prepend(str(tmp_path))
    there = ["more[here]", f"more==1.0 --hash=sha256:{'ab' * 32}", "from-git @ git+https://host/r.git@0123abcd"]
    lacking = ["more[lacking]", "from-git @ git+https://host/r.git@4567"]

    assert missing([*there, *lacking]) == lacking


def test_nothing_of_the_environment_here_is_missing_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    image = sky.Image.from_here()

    assert len(image.pip) > 50
    assert missing(image.pip) == []
    assert missing_wheels(image.wheels) == []


def test_local_packages_that_are_missing_here_come_through_an_overlay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _wheel(tmp_path, "skyward_local_probe", "1.2")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    site = overlay((), (), (read(path),))

    assert site is not None
    assert (site / "skyward_local_probe.py").exists()


def test_workers_see_the_callers_import_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "beside.py").write_text("HERE = 'found'\n")
    monkeypatch.syspath_prepend(str(tmp_path))

    def find() -> str:
        import importlib

        return str(importlib.import_module("beside").HERE)

    with sky.ComputePool("local", display="quiet") as pool:
        assert sky.compute(find)() >> pool == "found"
    sys.modules.pop("beside", None)


@pytest.mark.parametrize(
    ("option", "value", "accepted"),
    [
        ("machine", "p4d.24xlarge", "which uses this machine"),
        ("cpu", 100_000, "this machine has no more"),
        ("memory", "1000TB", "this machine has no more"),
        ("volume", sky.S3Volume("/data", "bucket"), "paths of this machine"),
        ("image", sky.Image(apt=("ffmpeg",)), "install what is missing yourself"),
        ("image", sky.Image(python="3.9"), "provider='local'"),
    ],
)
def test_what_this_machine_cant_be_made_into_is_refused(option: str, value: Any, accepted: str) -> None:
    with pytest.raises(sky.SpecError, match=accepted) as info:
        sky.ComputePool(provider="local", **{option: value})

    assert info.value.option.partition(".")[0] == option


def test_how_busy_the_machine_is_arrives_as_events(pool: sky.ComputePool) -> None:
    arrived = threading.Event()
    heard: list[sky.Metrics] = []

    def hear(event: sky.Metrics) -> None:
        heard.append(event)
        arrived.set()

    pool.on(sky.Metrics, hear)

    assert arrived.wait(60)
    assert heard[0].node == 0
    assert heard[0].instance_id == pool.instances[0].id
    assert 0 <= heard[0].cpu_percent <= 100
    assert 0 < heard[0].memory_used_mb < heard[0].memory_total_mb


_NO_LUCK = """
import asyncio, os, sys

if "skyward.node.agent" in sys.orig_argv:
    import distributed

    async def start(nanny):
        print("no luck", file=sys.stderr, flush=True)
        {}

    distributed.Nanny.start_unsafe = start
"""


@pytest.mark.parametrize(
    ("does", "told"),
    [
        ("raise RuntimeError('never')", "worker 0-0 did not start: RuntimeError: "),
        ("await asyncio.Event().wait()", "0 of 1 workers are up"),
        ("os._exit(3)", "ended unexpectedly (status 3; its log is "),
    ],
    ids=["fails", "hangs", "dies"],
)
def test_a_failed_start_names_a_log_with_what_workers_wrote(
    does: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(_NO_LUCK.format(does))
    monkeypatch.syspath_prepend(tmp_path)
    if "wait" in does:
        monkeypatch.setattr("skyward.cluster.cluster.START_TIMEOUT_S", 10)

    with pytest.raises(sky.PoolError) as caught, sky.ComputePool(display="quiet"):
        pass

    assert told in str(caught.value)
    (log,) = re.findall(r"log is ([^\s;)]+)", str(caught.value))
    assert "no luck" in Path(log).read_text()


def test_a_pool_leaves_no_files_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # a short name, as temporary folders have
        monkeypatch.setenv("TMPDIR", folder)
        monkeypatch.setattr(tempfile, "tempdir", None)

        with sky.ComputePool("local", display="quiet") as pool:
            assert sky.compute(tempfile.gettempdir)() >> pool == folder
            assert list(Path(folder).iterdir())

        assert not list(Path(folder).iterdir())
