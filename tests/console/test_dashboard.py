"""DashboardData of nodes: as machines tell them, as events, and on the dashboard's page."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

import skyward as sky
from skyward.console import PoolInfo
from skyward.console.dashboard import DashboardData
from skyward.node import metrics
from skyward.scheduler.page_data import KEPT, PageDataPlugin
from tests.waiting import wait_until

INFO = PoolInfo("abcdef01", 1, 1, "aws")
PROVISIONED = sky.InstanceProvisioned(
    instance_id="i-1", node=0, spot=True, provider="aws", instance_type="g5.xlarge", price_on_demand=1.0, price_spot=0.4
)
BUSY = sky.Metrics(
    instance_id="i-1", node=0, cpu_percent=50.0, memory_percent=25.0, memory_used_mb=1.0, memory_total_mb=4.0,
    gpu_utilization=80.0, gpu_memory_used_mb=6.0, gpu_memory_total_mb=24.0, gpu_temperature=60.0,
)  # fmt: skip


class NVMLError(Exception):
    pass


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """NVML as it answers on a machine with two GPUs."""
    nvml = SimpleNamespace(
        NVMLError=NVMLError,
        NVML_TEMPERATURE_GPU=0,
        opened=0,
        nvmlInit=lambda: setattr(nvml, "opened", nvml.opened + 1),
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetMemoryInfo=lambda index: SimpleNamespace(used=1e9 * (index + 1), total=80e9),
        nvmlDeviceGetUtilizationRates=lambda index: SimpleNamespace(gpu=(90, 30)[index]),
        nvmlDeviceGetTemperature=lambda index, kind: (50, 65)[index],
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    metrics._nvml.cache_clear()
    yield nvml
    metrics._nvml.cache_clear()


def test_gpus_are_read_together_and_the_driver_is_opened_once(two_gpus: SimpleNamespace) -> None:
    first, second = metrics.sample(), metrics.sample()

    assert {name: value for name, value in first.items() if name.startswith("gpu")} == {
        "gpu_utilization": 60.0, "gpu_memory_used_mb": 3000.0, "gpu_memory_total_mb": 160_000.0, "gpu_temperature": 65
    }  # fmt: skip
    assert second.keys() == first.keys()
    assert two_gpus.opened == 1


def test_a_gpu_that_does_not_answer_is_left_out(two_gpus: SimpleNamespace) -> None:
    def fail(index: int) -> Any:
        raise NVMLError

    two_gpus.nvmlDeviceGetUtilizationRates = fail

    assert "gpu_utilization" not in metrics.sample()
    assert "cpu_percent" in metrics.sample()


def test_processor_use_is_always_asked_for_in_the_same_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psutil.cpu_percent", threading.get_ident)
    over = threading.Event()

    async def samples() -> set[float]:
        sampler = metrics.Sampler()
        found = {(await sampler.sample())["cpu_percent"]}
        others = [asyncio.ensure_future(asyncio.to_thread(over.wait, 30)) for _ in range(3)]
        await asyncio.sleep(0)
        found.add((await sampler.sample())["cpu_percent"])
        over.set()
        await asyncio.gather(*others)
        sampler.close()
        return found

    assert len(asyncio.run(samples())) == 1


def test_events_come_to_figures_of_each_node_and_the_cost() -> None:
    sent: list[dict[str, Any]] = []
    figures = DashboardData(INFO)
    cost = sky.CostUpdate(elapsed_seconds=1, accumulated_cost=0.5, hourly_rate=0.0, spot_count=1, ondemand_count=0)
    figures.hear(PROVISIONED)
    figures.hear(cost)
    figures.send = sent.append
    figures.hear(sky.TaskProgress(done=30, total=40, failed=1))
    assert sent == []  # a machine will tell soon
    figures.hear(BUSY)
    figures.hear(BUSY)  # too soon for another one

    (message,) = sent
    assert message["cost"] == pytest.approx(0.5)
    assert message["heading"] == [
        "pool abcdef01", "1 node × 1 slot on aws", "30 of 40 calls, 1 failed", "0.5000 USD so far, 0.0000 USD/h"
    ]  # fmt: skip
    assert message["nodes"] == [
        {
            "node": 0, "machine": "i-1", "type": "g5.xlarge", "lease": "spot", "price": 0.4, "state": "booting",
            "cpu": 50.0, "memory": 25.0, "gpu": 80.0, "gpu_memory": 25.0, "gpu_temperature": 60.0,
        }
    ]  # fmt: skip


def test_nodes_that_are_one_machine_share_its_load() -> None:
    sent: list[dict[str, Any]] = []
    figures = DashboardData(PoolInfo("abcdef01", 2, 1, "local", is_here=True))
    for node in range(2):
        figures.hear(sky.InstanceProvisioned(instance_id=f"local-{node}", node=node, spot=False, provider="local"))
    figures.send = sent.append
    figures.hear(BUSY)

    assert [node["cpu"] for node in sent[0]["nodes"]] == [50.0, 50.0]


def test_the_scheduler_keeps_means_and_not_for_ever() -> None:
    plugin = PageDataPlugin()
    nodes = [{"node": 0, "cpu": 10.0}, {"node": 1, "cpu": 30.0, "gpu": 5.0}, {"node": 2}]

    for moment in range(KEPT + 5):
        plugin.heard("client", nodes, 1.0, float(moment))

    assert len(plugin.history) == KEPT
    assert plugin.history[-1] == {
        "time": float(KEPT + 4), "cost": 1.0, "cpu": 20.0, "memory": None, "gpu": 5.0, "gpu_memory": None
    }  # fmt: skip


def test_the_page_shows_what_the_plugin_knows_and_omits_the_rest() -> None:
    from skyward.scheduler.page import _PageView

    plugin = PageDataPlugin()
    page = _PageView(plugin)
    assert "has not told" in page._nodes.text
    node = {"node": 0, "machine": "<i-1>", "price": 0.4, "cpu": 9.6}
    plugin.heard("client", [node], 0.25, 100.0, ["pool <a>", "1 call"])
    page.update()

    assert "<p>pool &lt;a&gt; · 1 call</p>" in page._nodes.text
    assert "<td>0</td><td>&lt;i-1&gt;</td><td class=number>0.4000</td>" in page._nodes.text
    assert "<td class=number>10</td><td class=number>–</td>" in page._nodes.text  # memory is not known yet
    assert "GPU" not in page._nodes.text
    assert page._history.data["time"] == [100_000.0]
    assert page._history.data["cost"] == [0.25]
    assert {share: line.visible for share, line in page._lines.items()} == {
        "cpu": True, "memory": False, "gpu": False, "gpu_memory": False
    }  # fmt: skip
    assert page._costs.visible


@pytest.mark.slow
def test_the_dashboard_has_a_page_of_skyward_unless_metrics_are_off() -> None:
    with sky.ComputePool("local", display="quiet") as pool:
        page, links = read(pool.dashboard_link.replace("status", "skyward"))
        wait_until(lambda: any(moment["cpu"] is not None for moment in _history(pool)))
    assert page == 200
    assert 'href="skyward"' in links
    heard: list[sky.Metrics] = []
    with sky.ComputePool("local", display="quiet", collect_metrics=False) as pool:
        pool.on(sky.Metrics, heard.append)
        page, _ = read(pool.dashboard_link.replace("status", "skyward"))
        _, links = read(pool.dashboard_link)
        sky.compute(__import__("time").sleep)(metrics.PERIOD_S + 1) >> pool
        assert _history(pool) == []

    assert page == 404
    assert 'href="skyward"' not in links
    assert heard == []


def _history(pool: sky.ComputePool) -> list[dict[str, float | None]]:
    found: list[dict[str, float | None]] = pool.client.run_on_scheduler(
        lambda dask_scheduler: list(dask_scheduler.plugins["skyward-page-data"].history)
    )
    return found


def read(link: str) -> tuple[int, str]:
    """Return status and text of a page."""
    import urllib.error
    import urllib.request

    try:
        with urllib.request.urlopen(link, timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as exc:
        with exc:
            return exc.code, ""
