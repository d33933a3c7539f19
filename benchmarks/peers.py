"""What skyward is compared with, each started with as many workers as skyward has slots, and used as its manual says.

All peers offer what cases need: `call` runs one call and waits for it, `map` runs one call per item, `broadcast` one
per worker, and inside `joblib` joblib's `Parallel` runs there. `delayed` makes a function whose calls take other calls
as arguments, and `compute` runs such calls. `shared` arguments are the same for all calls of a `map`: each peer hands
them over in the way that it has for that.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import logging
import multiprocessing
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import joblib
from joblib.externals import loky as loky_package

import skyward as sky
from skyward.integrations import joblib_backend

Context = contextlib.AbstractContextManager[Any]
Function = Callable[..., Any]


@dataclass
class Skyward:
    pool: sky.ComputePool

    def __post_init__(self) -> None:
        self._compute = cache(sky.compute)

    def call(self, fn: Function, *args: Any) -> Any:
        return self._compute(fn)(*args) >> self.pool

    def map(self, fn: Function, items: Sequence[Any], **shared: Any) -> Sequence[Any]:
        compute = self._compute(fn)
        return sky.gather(*[compute(item, **shared) for item in items]) >> self.pool

    def broadcast(self, fn: Function, value: Any) -> Sequence[Any]:
        return self._compute(fn)(value) @ self.pool

    def delayed(self, fn: Function) -> Function:
        return self._compute(fn)

    def compute(self, calls: Sequence[Any]) -> Sequence[Any]:
        return sky.gather(*calls) >> self.pool

    def joblib(self) -> Context:
        return joblib_backend(self.pool)


@dataclass
class Dask:
    client: Any

    def call(self, fn: Function, *args: Any) -> Any:
        return self.client.submit(fn, *args, pure=False).result()

    def map(self, fn: Function, items: Sequence[Any], **shared: Any) -> Sequence[Any]:
        futures = {name: self.client.scatter(value, hash=False) for name, value in shared.items()}
        return self.client.gather(self.client.map(fn, items, pure=False, **futures))

    def broadcast(self, fn: Function, value: Any) -> Sequence[Any]:
        there = self.client.scatter(value, broadcast=True, hash=False)
        workers = self.client.scheduler_info(n_workers=-1)["workers"]
        return self.client.gather([self.client.submit(fn, there, workers=[w], pure=False) for w in workers])

    def delayed(self, fn: Function) -> Function:
        import dask

        return dask.delayed(fn, pure=False)

    def compute(self, calls: Sequence[Any]) -> Sequence[Any]:
        return self.client.gather(self.client.compute(list(calls)))

    def joblib(self) -> Context:
        return joblib.parallel_config("dask", client=self.client)


@dataclass
class Executor:
    """A `ProcessPoolExecutor`, Python's or loky's. Its `map` sends several calls at once, as multiprocessing does."""

    executor: Any
    workers: int

    def call(self, fn: Function, *args: Any) -> Any:
        return self.executor.submit(fn, *args).result()

    def map(self, fn: Function, items: Sequence[Any], **shared: Any) -> Sequence[Any]:
        chunk = max(1, len(items) // (4 * self.workers))
        return list(self.executor.map(partial(fn, **shared), items, chunksize=chunk))

    def joblib(self) -> Context:
        return joblib.parallel_config("loky", n_jobs=self.workers)


@dataclass
class Ray:
    ray: Any
    workers: int

    def __post_init__(self) -> None:
        self._remote = cache(self.ray.remote)

    def call(self, fn: Function, *args: Any) -> Any:
        return self.ray.get(self._remote(fn).remote(*args))

    def map(self, fn: Function, items: Sequence[Any], **shared: Any) -> Sequence[Any]:
        remote = self._remote(fn)
        references = {name: self.ray.put(value) for name, value in shared.items()}
        return self.ray.get([remote.remote(item, **references) for item in items])

    def broadcast(self, fn: Function, value: Any) -> Sequence[Any]:
        there = self.ray.put(value)  # on one machine there is one store
        return self.ray.get([self._remote(fn).remote(there) for _ in range(self.workers)])

    def delayed(self, fn: Function) -> Function:
        return self._remote(fn).remote  # which begins to run at once

    def compute(self, calls: Sequence[Any]) -> Sequence[Any]:
        return self.ray.get(list(calls))

    def joblib(self) -> Context:
        return joblib.parallel_config("ray", n_jobs=self.workers)


@dataclass
class Socket:
    """One TLS connection after another over loopback, to a process that does nothing but receive."""

    security: Any
    port: int

    def send(self, data: memoryview) -> None:
        """Return when the other side has all of it."""
        context = self.security.get_connection_args("client")["ssl_context"]
        with socket.create_connection(("127.0.0.1", self.port)) as plain, context.wrap_socket(plain) as connection:
            connection.sendall(data.nbytes.to_bytes(8, "big"))
            for start in range(0, data.nbytes, 1 << 20):
                connection.sendall(data[start : start + (1 << 20)])
            if connection.recv(2) != b"ok":
                raise ConnectionError("the receiver has ended")


def _receive(security: Any, ready: Any) -> None:
    context = security.get_listen_args("scheduler")["ssl_context"]
    with socket.create_server(("127.0.0.1", 0)) as server:
        ready.send(server.getsockname()[1])
        while True:
            plain, _ = server.accept()
            with context.wrap_socket(plain, server_side=True) as connection:
                data = memoryview(bytearray(int.from_bytes(connection.recv(8), "big")))
                done = 0
                while done < data.nbytes and (got := connection.recv_into(data[done : done + (1 << 20)])):
                    done += got
                connection.sendall(b"ok")


# --- starting them, each with so many workers ---------------------------------------------------------------


@contextlib.contextmanager
def skyward(workers: int) -> Iterator[Skyward]:
    with sky.ComputePool("local", concurrency=workers, display="quiet") as pool:
        yield Skyward(pool)


@contextlib.contextmanager
def skyward_nodes(workers: int) -> Iterator[Skyward]:
    with sky.ComputePool("local", nodes=workers, display="quiet") as pool:
        yield Skyward(pool)


@contextlib.contextmanager
def dask(workers: int) -> Iterator[Dask]:
    from distributed import Client, LocalCluster

    cluster = LocalCluster(n_workers=workers, threads_per_worker=1, dashboard_address=":0")
    with cluster, Client(cluster, set_as_default=False) as client:
        client.wait_for_workers(workers)
        yield Dask(client)


@contextlib.contextmanager
def loky(workers: int) -> Iterator[Executor]:
    # joblib has an executor of its own, which it starts when it first needs it and keeps.
    try:
        with loky_package.ProcessPoolExecutor(workers) as executor:
            yield Executor(executor, workers)
    finally:
        loky_package.get_reusable_executor().shutdown()


@contextlib.contextmanager
def processes(workers: int) -> Iterator[Executor]:
    # Not forked: this process has threads of all the other peers.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as executor:
        yield Executor(executor, workers)


@contextlib.contextmanager
def ray(workers: int) -> Iterator[Ray]:
    import ray
    from ray.util.joblib import register_ray

    ray.init(num_cpus=workers, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
    register_ray()
    try:
        yield Ray(ray, workers)
    finally:
        ray.shutdown()


@contextlib.contextmanager
def tls_socket(workers: int) -> Iterator[Socket]:  # noqa: ARG001 - one, whatever the others have
    from distributed.security import Security

    security = Security.temporary()
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    receiver = context.Process(target=_receive, args=(security, theirs), daemon=True)
    receiver.start()
    try:
        yield Socket(security, ours.recv())
    finally:
        receiver.terminate()
        receiver.join()


Start = Callable[[int], contextlib.AbstractContextManager[Any]]

JOBLIB: dict[str, Start] = {"skyward": skyward, "Dask": dask, "loky": loky, "Ray": ray}
"""Those that joblib has a backend for."""
ALL = JOBLIB | {"processes": processes}
