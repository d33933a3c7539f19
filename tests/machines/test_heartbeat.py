"""Heartbeats reach machines whatever else keeps the caller, or its link, busy."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import skyward as sky
from skyward.cluster import heartbeat
from skyward.providers.base import Login
from skyward.spec import pool as spec
from tests.cloudbox import Machine
from tests.machines.conftest import IMAGE, Site

LIMIT_S = 3.0


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(spec, "LEAST_HEARTBEAT_TIMEOUT_S", 0.1)
    monkeypatch.setenv("SKYWARD_DATA_DIR", str(tmp_path / "data"))


@pytest.fixture(scope="module")
def machine(boot: Callable[..., list[Machine]]) -> Machine:
    (machine,) = boot(1)
    return machine


def open_pool(site: Site, machine: Machine, image: sky.Image = IMAGE, **options: Any) -> sky.ComputePool:
    options = {"heartbeat_timeout": LIMIT_S, "display": "quiet", "retries": 0, **options}
    return sky.ComputePool(site.provider(machine), image=image, **options)


def test_a_busy_event_loop_does_not_delay_heartbeats(site: Site, machine: Machine) -> None:
    pid = sky.compute(os.getpid)

    with open_pool(site, machine) as pool:
        before = pid() >> pool
        pool.cluster.loop.add_callback(time.sleep, 2 * LIMIT_S)
        assert pid() >> pool == before


_THROTTLED = """
import os, socket, sys, threading, time

there = socket.create_connection((sys.argv[1], 22))

def send():
    while data := os.read(0, 16384):
        there.sendall(data)
        time.sleep(len(data) / float(sys.argv[2]))

threading.Thread(target=send, daemon=True).start()
while data := there.recv(65536):
    os.write(1, data)
"""


def test_bulk_data_does_not_delay_heartbeats(
    site: Site, machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files, before there is an agent, and then an argument fill the link for longer than the limit."""
    login = sky.SSH._login
    rate = 250_000

    def throttled(self: sky.SSH, text: str) -> Login:
        proxy = (sys.executable, "-c", _THROTTLED, machine.address, str(rate))
        return replace(login(self, text), proxy_command=proxy)

    monkeypatch.setattr(sky.SSH, "_login", throttled)
    monkeypatch.chdir(tmp_path)
    noise = os.urandom(int(1.7 * LIMIT_S * rate))
    Path("noise").write_bytes(noise)

    with open_pool(site, machine, replace(IMAGE, include=["noise"])) as pool:
        assert sky.compute(len)(noise) >> pool == len(noise)


def test_a_host_without_a_second_login_gets_heartbeats_over_the_first(
    site: Site, machine: Machine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Refused(heartbeat.Link):
        def __init__(self, login: Login) -> None:
            super().__init__(replace(login, port=1))

    monkeypatch.setattr(heartbeat, "Link", Refused)

    with caplog.at_level(logging.WARNING, "skyward"), open_pool(site, machine) as pool:
        assert sky.compute(time.sleep)(2 * LIMIT_S) >> pool is None

    assert "heartbeats share one SSH connection with all data" in caplog.text
