"""How fast a pool is from far away, beside a bare Dask cluster on the same machines.

Usage: python benchmarks/wan.py [--delay-ms MS] [--rate-mb-s N] [--rounds N] [--only CASE,...] [--json FILE]

Needs Linux and root: the two machines are cloudbox machines on this host (see tests/cloudbox). All that the caller and
the machines say to each other goes through one link with delay and limited rate (see pipe.py), which also counts it;
machines reach each other directly. skyward goes through it over SSH. Dask's client talks to its scheduler in the open,
and only to it. Each machine has one slot for skyward and one worker with one thread for Dask.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import pickle
import random
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for benchmarks.* and tests.cloudbox

import numpy as np
from joblib import Parallel, delayed
from sklearn.datasets import load_digits
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.model_selection import GridSearchCV
from sklearn.svm import SVC

import skyward as sky
from benchmarks import peers, report
from benchmarks.bench import fully, measure
from benchmarks.case import Case, Pick, Row, Target, timed, within
from benchmarks.pipe import Link
from benchmarks.startup import Bench
from skyward.cluster.requirements import recipe
from skyward.cluster.wheel import own_wheel
from tests.cloudbox import Machine, Network, why_not

try:
    import pandas
except ImportError:
    pandas = None

NODES = 2
IMAGE = sky.Image(pip=["numpy", "scikit-learn", *(["pandas"] if pandas else [])])
_DASK_PORT = 8786
_seeds = itertools.count()


# --- both contestants, on the same machines -----------------------------------------------------------------


class Skyward(peers.Skyward):
    def map_large(self, fn: Callable[..., Any], items: Sequence[Any]) -> Sequence[Any]:
        return self.map(fn, items)


class Dask(peers.Dask):
    def map_large(self, fn: Callable[..., Any], items: Sequence[Any]) -> Sequence[Any]:
        """Run one call per item, each handed over in the way that Dask's manual recommends for large ones."""
        return self.map(fn, self.client.scatter(items, hash=False))


class Site:
    """Two machines at the other end of a link, and what runs on them."""

    def __init__(self, link: Link, bench: Bench, machines: Sequence[Machine]) -> None:
        self._link, self._bench, self._machines = link, bench, machines

    @contextlib.contextmanager
    def skyward(self, workers: int) -> Iterator[Skyward]:
        hosts = [self._way_to(machine) for machine in self._machines]
        network = str(self._bench.network.subnet)
        provider = sky.SSH(hosts, key=self._bench.key, known_hosts=self._bench.known_hosts, addresses=network)
        with sky.ComputePool(provider, nodes=workers, image=IMAGE, display="quiet") as pool:
            yield Skyward(pool)

    def _way_to(self, machine: Machine) -> str:
        port = self._link.open("skyward", machine.address, 22)
        with self._bench.known_hosts.open("a") as known:
            known.write(f"[127.0.0.1]:{port} {machine.host_key()}\n")
        return f"root@127.0.0.1:{port}"

    @contextlib.contextmanager
    def dask(self, workers: int) -> Iterator[Dask]:
        """Start Dask in the environment that skyward has made; it ends with the machines."""
        from distributed import Client

        python = recipe(IMAGE, own_wheel()).interpreter
        first = self._machines[0].address
        module = f"{python} -m distributed.cli"
        self._start(self._machines[0], f"{module}.dask_scheduler --host {first} --port {_DASK_PORT} --no-dashboard")
        for machine in self._machines:
            options = f"--host {machine.address} --nworkers 1 --nthreads 1 --no-dashboard"
            self._start(machine, f"{module}.dask_worker tcp://{first}:{_DASK_PORT} {options}")
        address = f"tcp://127.0.0.1:{self._link.open('Dask', first, _DASK_PORT)}"
        with Client(address, direct_to_workers=False, set_as_default=False, timeout=60) as client:
            client.wait_for_workers(workers, timeout=60)
            yield Dask(client)

    def _start(self, machine: Machine, command: str) -> None:
        known = f"UserKnownHostsFile={self._bench.known_hosts}"
        options = ["-i", str(self._bench.key), "-o", known, "-o", "BatchMode=yes"]
        quiet = f"setsid sh -c {shlex.quote(command)} > ~/dask.log 2>&1 < /dev/null &"
        subprocess.run(["ssh", "-F", "none", *options, f"root@{machine.address}", quiet], check=True)


# --- what they do: functions of this file, which are sent by value, so machines need no module of it --------


def nothing(x: int) -> int:
    return x


def touch(array: np.ndarray, start: int) -> int:
    """Read every page, and return what does not depend on the order of additions."""
    return int((array[start::512] > 0.5).sum())


def touch_from(start: int, array: np.ndarray) -> int:
    return touch(array, start)


def noise(seed: int, size: int) -> bytes:
    return np.random.default_rng(seed).bytes(size)


def size_of(value: Any) -> int:
    return len(value)


def scale(factor: float, model: Any) -> float:
    return factor * len(getattr(model, "vocabulary_", model))


class Cases:
    """The rows of the table, by case."""

    def __init__(self, link: Link) -> None:
        self._link = link

    def rows(self, names: Sequence[str], contestants: Mapping[str, Any], pick: Pick) -> Iterator[Row]:
        for name in names:
            yield from getattr(self, name)(contestants, pick)

    def _rows(
        self,
        title: str,
        contestants: Mapping[str, Any],
        work: Callable[[Any], float],
        *targets: Target,
        floor: float | None = None,
        distinct: int | None = None,
        sent_targets: tuple[Target, ...] = (),
    ) -> Iterator[Row]:
        """Yield a row of the seconds that `work` returns, and two of the bytes that the link carries meanwhile."""
        carried: dict[str, tuple[float, float]] = {}

        def run(name: str) -> float:
            before = self._link.carried(name)
            seconds = work(contestants[name])
            sent, received = (now - then for now, then in zip(self._link.carried(name), before, strict=True))
            carried[name] = sent / 1e3, received / 1e3
            return seconds

        runs: dict[str, Callable[[], float]] = {name: partial(run, name) for name in contestants}
        if floor is not None:
            runs["floor"] = lambda: floor
        yield Row(title, runs, targets=targets)
        sent: dict[str, Callable[[], float]] = {name: lambda name=name: carried[name][0] for name in contestants}
        received: dict[str, Callable[[], float]] = {name: lambda name=name: carried[name][1] for name in contestants}
        if distinct is not None:
            sent["distinct"] = lambda: distinct / 1e3
        yield Row(f"{title}: sent", sent, "kB", sent_targets)
        yield Row(f"{title}: received", received, "kB")

    def call(self, contestants: Mapping[str, Any], pick: Pick) -> Iterator[Row]:
        calls = pick(20, 3)

        def work(peer: Any) -> float:
            return statistics.median(timed(partial(peer.call, nothing, i))[0] for i in range(calls))

        trip = self._link.round_trip_s
        yield from self._rows(f"one call, median of {calls}", contestants, work, within("floor", 1.2), floor=trip)

    def noops(self, contestants: Mapping[str, Any], pick: Pick) -> Iterator[Row]:
        calls = pick(10_000, 100)
        yield from self._rows(f"{calls:,} no-ops", contestants, _mapped(nothing, range(calls)))

    def short(self, contestants: Mapping[str, Any], pick: Pick) -> Iterator[Row]:
        durations = pick(2_000, 100) * [0.001]
        floor = self._link.round_trip_s + sum(durations) / NODES
        work = _mapped(time.sleep, durations)
        yield from self._rows(f"{len(durations):,} × 1 ms", contestants, work, within("floor", 1.3), floor=floor)

    def argument(self, contestants: Mapping[str, Any], pick: Pick) -> Iterator[Row]:
        megabytes = pick(50, 2)

        def work(peer: Any) -> float:
            array = np.random.default_rng(next(_seeds)).random(megabytes * 125_000)
            seconds, values = timed(lambda: peer.map(touch_from, range(20), array=array))
            assert list(values) == [touch(array, start) for start in range(20)]
            return seconds

        size = megabytes * 1_000_000
        targets = within("floor", 1.1), within("Dask", 1)
        limits = {"floor": size / self._link.rate, "distinct": size}
        yield from self._rows(f"{megabytes} MB array × 20 calls", contestants, work, *targets, **limits)

    def results(self, contestants: Mapping[str, Any], pick: Pick) -> Iterator[Row]:
        size = pick(5_000_000, 100_000)

        def work(peer: Any) -> float:
            seeds = [next(_seeds) for _ in range(20)]
            seconds, values = timed(lambda: peer.map(partial(noise, size=size), seeds))
            assert [value[:8] for value in values] == [noise(seed, size)[:8] for seed in seeds]
            return seconds

        floor = 20 * size / self._link.rate
        yield from self._rows(f"20 results of {size / 1e6:g} MB", contestants, work, floor=floor)

    def joblib(self, contestants: Mapping[str, Any], pick: Pick) -> Iterator[Row]:
        calls = pick(5_000, 100)

        def work(peer: Any) -> float:
            with peer.joblib():
                return timed(lambda: Parallel(n_jobs=-1)(delayed(nothing)(i) for i in range(calls)))[0]

        yield from self._rows(f"Parallel: {calls:,} no-ops", contestants, work)

    def grid(self, contestants: Mapping[str, Any], pick: Pick) -> Iterator[Row]:
        data, label = load_digits(return_X_y=True)
        data, label = data[: pick(len(data), 200)], label[: pick(len(data), 200)]
        candidates = {"C": [0.1, 1, 10, 100, 1000]}

        def work(peer: Any) -> float:
            order = np.random.default_rng(next(_seeds)).permutation(len(data))  # data that no machine has seen
            search = GridSearchCV(SVC(), candidates, cv=5, n_jobs=-1)
            with peer.joblib():
                return timed(lambda: search.fit(data[order], label[order]))[0]

        sent = {"distinct": data.nbytes + label.nbytes, "sent_targets": (within("distinct", 1.3),)}
        yield from self._rows("GridSearchCV, 25 fits", contestants, work, within("Dask", 0.4), **sent)

    def compressible(self, contestants: Mapping[str, Any], pick: Pick) -> Iterator[Row]:
        size = pick(6_250_000, 100_000)

        def work(peer: Any) -> float:
            values = [*(_numbers(size) for _ in range(4)), *(_text(size) for _ in range(4))]
            seconds, found = timed(lambda: peer.map_large(size_of, values))
            assert list(found) == list(map(len, values))
            return seconds

        title = f"8 × {size / 1e6:g} MB that compress well"
        yield from self._rows(title, contestants, work, within("Dask", 0.5), distinct=8 * size)

    def reused(self, contestants: Mapping[str, Any], pick: Pick) -> Iterator[Row]:
        words = pick(20_000, 200)
        values = {"estimator": _vectorizer} | ({"frame": _frame} if pandas else {})
        for name, make in values.items():

            def work(peer: Any, make: Callable[[int], Any] = make) -> float:
                value = make(words)
                factors = [random.random() for _ in range(40)]
                seconds, found = timed(lambda: peer.map(scale, factors, model=value))
                assert list(found) == [scale(factor, value) for factor in factors]
                return seconds

            size = len(pickle.dumps(make(words), pickle.HIGHEST_PROTOCOL))
            yield from self._rows(f"40 calls of one {name}, {size // 1000} kB", contestants, work, distinct=size)


NAMES = ("call", "noops", "short", "argument", "results", "joblib", "grid", "compressible", "reused")


def _mapped(fn: Callable[[Any], Any], items: Sequence[Any]) -> Callable[[Any], float]:
    return lambda peer: timed(lambda: peer.map(fn, items))[0]


def _numbers(size: int) -> np.ndarray:
    return np.arange(size // 8, dtype=np.int64) + 1_000_000 * next(_seeds)


def _text(size: int) -> bytes:
    draw = random.Random(next(_seeds))
    lines = (
        f"2026-01-01 00:00:00 INFO request {draw.randrange(10**6)} took {draw.randrange(99)} ms"
        for _ in range(size // 50)
    )
    return "\n".join(lines).encode()


def _words(count: int) -> list[str]:
    draw = random.Random(next(_seeds))
    return [f"w{draw.randrange(10**10):010d}" for _ in range(count)]


def _vectorizer(count: int) -> CountVectorizer:
    return CountVectorizer().fit([" ".join(_words(count))])


def _frame(count: int) -> Any:
    words = np.array(_words(count), dtype=object)
    return pandas.DataFrame({"first": words[: count // 2], "second": words[count // 2 :]}, dtype=object)


# --- the program --------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--delay-ms", type=float, default=20.0, help="each way")
    parser.add_argument("--rate-mb-s", type=float, default=12.5, help="each way")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", metavar="CASE,...", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure into it")
    options = parser.parse_args()
    names = options.only.split(",") if options.only else list(NAMES)
    if unknown := [name for name in names if name not in NAMES]:
        parser.error(f"--only {','.join(unknown)} is invalid: expected {', '.join(NAMES)}")
    if reason := why_not():
        sys.exit(f"not measured: {reason}")

    facts = report.facts(options.rounds, quick=False)
    facts["time.sleep(0.001)"] = report.show(timed(lambda: [time.sleep(0.001) for _ in range(500)])[0] / 500, "s")
    facts["link"] = f"{options.delay_ms:g} ms and {options.rate_mb_s:g} MB/s each way"
    missing: dict[str, str] = {}
    started = time.perf_counter()

    def tell(line: str) -> None:
        print(f"{time.perf_counter() - started:5.0f} s  {line}", file=sys.stderr, flush=True)

    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="skyward-wan-")))
        os.environ["SKYWARD_DATA_DIR"] = str(folder / "data")  # its journal is not the user's
        link = stack.enter_context(Link(options.delay_ms / 1e3, options.rate_mb_s * 1e6))
        facts["a byte there and back"] = report.show(link.echo_s(), "s")
        network = Network()
        stack.callback(network.close)
        bench = Bench(network, folder)
        machines = []
        for _ in range(NODES):
            machines.append(bench.boot())
            stack.callback(machines[-1].destroy)
        site = Site(link, bench, machines)
        contestants = {"skyward": site.skyward, "Dask": site.dask}
        case = Case("wan", partial(Cases(link).rows, names), contestants, workers=NODES)
        found = measure(case, options.rounds, fully, missing, tell)
    print(report.markdown(found, facts, missing))
    if options.json:
        options.json.write_text(json.dumps(report.as_json(found, facts, missing), indent=1) + "\n")


if __name__ == "__main__":
    main()
