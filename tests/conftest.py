"""What several test modules share."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import hypothesis
import pytest

import skyward as sky
from tests import chromium

hypothesis.settings.register_profile("skyward", derandomize=True, deadline=None)
hypothesis.settings.load_profile("skyward")

# Shells let what they start in the background ignore Ctrl-C, and so would all programs that tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _nobodys_own_settings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Let no test read or write what belongs to whoever runs the tests: configuration, journal and logs."""
    from skyward import config

    with pytest.MonkeyPatch.context() as patch:
        for key in config.KEYS:
            patch.delenv(f"SKYWARD_{key.upper()}", raising=False)
        for name in ("CONFIG", "DATA"):
            patch.setenv(f"SKYWARD_{name}_DIR", str(tmp_path_factory.mktemp(name.lower())))
        yield


@pytest.fixture(scope="session")
def pool() -> Iterator[sky.ComputePool]:
    """Two nodes of two slots, started once per test process; leave it as you found it."""
    with sky.ComputePool(provider="local", nodes=2, concurrency=2, display="quiet") as pool:
        yield pool


@pytest.fixture(scope="module")
def joined() -> Iterator[sky.ComputePool]:
    """A pool on a Dask cluster that was there before, with one worker."""
    from distributed import LocalCluster

    with (
        LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=":0") as cluster,
        sky.ComputePool(sky.Dask(cluster), display="quiet") as pool,
    ):
        yield pool


@pytest.fixture(params=["pool", "joined"])
def any_pool(request: pytest.FixtureRequest) -> sky.ComputePool:
    """Each of `pool` and `joined` in turn."""
    found: sky.ComputePool = request.getfixturevalue(request.param)
    return found


@pytest.fixture(scope="session")
def _browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[chromium.Browser]:
    if reason := chromium.why_not():
        pytest.skip(reason)
    browser = chromium.Browser(tmp_path_factory.mktemp("browser"))
    yield browser
    browser.close()


@pytest.fixture
def browser(_browser: chromium.Browser) -> Iterator[chromium.Browser]:
    """A browser with nothing in it, started once per test process."""
    yield _browser
    _browser.open("about:blank")  # no page goes on asking a pool that is gone
    _browser.complaints()
