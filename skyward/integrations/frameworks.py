"""Decorators for distributed training: `torch`, `jax`, `keras`, `tensorflow`, `transformers`.

Under ``@`` the parts of a decorated function are one job: each runs in a separate process, in which its framework
knows the others before the function begins. Under ``>>`` the function is alone, a world of one. The frameworks
themselves are imported on workers only, by the modules of `setup`.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import threading
from collections.abc import Callable
from typing import Any, Literal, ParamSpec, Protocol, TypeVar, overload

from skyward.compute import ComputeFunction, is_generator_function, run_coroutine
from skyward.errors import invalid
from skyward.spec.validation import check_choice
from skyward.transfer.wire import Isolation
from skyward.worker import context, runtime

P = ParamSpec("P")
R = TypeVar("R")

_one_at_a_time = threading.Lock()  # a process has one default process group, and its threads may be several slots


class _Decorator(Protocol):
    @overload
    def __call__(self, fn: ComputeFunction[P, R], /) -> ComputeFunction[P, R]: ...
    @overload
    def __call__(self, fn: Callable[P, R], /) -> Callable[P, R]: ...


class Distributed:
    """A function with what it needs around it. Travels like any function."""

    def __init__(self, fn: Callable[..., Any], isolation: Isolation) -> None:
        if is_generator_function(fn):
            name = getattr(fn, "__name__", "fn")
            raise TypeError(
                f"{name}() is a generator function, and each part of a distributed job gives one value: return a list"
            )
        functools.update_wrapper(self, fn)
        self.skyward_isolation = isolation

    def __reduce__(self) -> Any:
        # The state comes second: it may import modules of the user's that import the framework.
        return _received, (self.skyward_isolation,), self.__dict__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        fn: Callable[..., Any] = self.__wrapped__  # type: ignore[attr-defined]
        if runtime.prepare is not None:  # a separate process, which is ready
            return fn(*args, **kwargs)
        isolation = self.skyward_isolation
        with _one_at_a_time, importlib.import_module(isolation.setup).session(context.world(), **isolation.options):
            value = fn(*args, **kwargs)
            return run_coroutine(value) if inspect.iscoroutine(value) else value


def _received(isolation: Isolation) -> Distributed:
    """Return a function that is still to get its state."""
    if context.running.get() is not None:
        os.environ.update(isolation.environment)
    return Distributed.__new__(Distributed)


def _decorate(fn: Any, setup: str, packages: tuple[str, ...], **options: Any) -> Any:
    environment = {"KERAS_BACKEND": str(options["backend"])} if setup == "keras" else {}
    isolation = Isolation(f"skyward.integrations.setup.{setup}", options, packages, environment)
    if isinstance(fn, ComputeFunction):
        return ComputeFunction(Distributed(fn.fn, isolation), retries=fn.retries, timeout=fn.timeout)
    return Distributed(fn, isolation)


def _decorator(given: Any, setup: str, packages: tuple[str, ...], **options: Any) -> Any:
    """Return a decorator, or what it makes of the function that was given in the place of an option."""
    if callable(given):
        return _decorate(given, setup, packages, **options)
    return functools.partial(_decorate, setup=setup, packages=packages, **options)


def _chosen(value: Any, accepted: tuple[str, ...], *, optional: bool) -> str | None:
    if value is None and optional:
        return None
    try:
        return str(check_choice(accepted, "None to choose automatically" if optional else "")(value))
    except ValueError as exc:
        raise invalid("backend", value, str(exc)) from None


_TORCH_BACKENDS = ("nccl", "gloo")
_KERAS_BACKENDS = ("jax", "torch", "tensorflow")
TorchBackend = Literal["nccl", "gloo"]
KerasBackend = Literal["jax", "torch", "tensorflow"]


@overload
def torch(fn: ComputeFunction[P, R], /) -> ComputeFunction[P, R]: ...
@overload
def torch(fn: Callable[P, R], /) -> Callable[P, R]: ...
@overload
def torch(backend: TorchBackend | None = None) -> _Decorator: ...
def torch(backend: Any = None) -> Any:
    """Run a function under ``@`` as the ranks of a `torch.distributed` process group, which ends after it.

    Use it above or below ``@sky.compute``. `MASTER_ADDR`, `MASTER_PORT`, `RANK`, `WORLD_SIZE`, `LOCAL_RANK`,
    `LOCAL_WORLD_SIZE` and `NODE_RANK` are set as torchrun sets them. Each rank runs in a new process, so only returned
    and saved data remains after a job. When a rank fails, its exception is raised at once and the other ranks are
    stopped.

    Parameters
    ----------
    backend
        ``"nccl"``, for GPUs, or ``"gloo"``; None: nccl where torch sees a GPU.

    Raises
    ------
    SpecError
        The backend is unknown. Raised by ``@``: nccl is set without a GPU, or torch is not installed on the machines.
    VersionMismatchError
        By ``@``: torch differs between nodes.
    WorkerDiedError
        By ``@``: the process of a rank was killed, or crashed.

    Examples
    --------
    ::

        @sky.integrations.torch(backend="gloo")
        @sky.compute
        def train() -> float: ...

        losses = train() @ pool
    """
    options = {"backend": None if callable(backend) else _chosen(backend, _TORCH_BACKENDS, optional=True)}
    return _decorator(backend, "torch", ("torch",), **options)


@overload
def jax(fn: ComputeFunction[P, R], /) -> ComputeFunction[P, R]: ...
@overload
def jax(fn: Callable[P, R], /) -> Callable[P, R]: ...
@overload
def jax() -> _Decorator: ...
def jax(fn: Any = None) -> Any:
    """Run a function under ``@`` as the processes of one `jax.distributed` cluster; see `torch` for the rest.

    `jax.devices()` has the devices of all nodes, `jax.local_devices()` its own. On CPUs, collectives use gloo.
    """
    return _decorator(fn, "jax", ("jax",))


@overload
def keras(fn: ComputeFunction[P, R], /) -> ComputeFunction[P, R]: ...
@overload
def keras(fn: Callable[P, R], /) -> Callable[P, R]: ...
@overload
def keras(backend: KerasBackend = "jax") -> _Decorator: ...
def keras(backend: Any = "jax") -> Any:
    """Run a function under ``@`` with Keras 3 on `backend`, data-parallel over all nodes; see `torch` for the rest.

    Give `fit` each rank's part of the data, with the same number of batches on each: ``sky.shard(x, y,
    drop_last=True)``. On jax, the distribution is `keras.distribution.DataParallel` over all devices. On torch,
    gradients are averaged among the ranks before the optimizer applies them. On tensorflow, create models inside the
    scope of a `tf.distribute.MultiWorkerMirroredStrategy`, for which `TF_CONFIG` is set. All ranks start with the same
    random seed and the same weights; if you set another seed, set the same one on all ranks.
    """
    chosen = "jax" if callable(backend) else _chosen(backend, _KERAS_BACKENDS, optional=False)
    return _decorator(backend, "keras", ("keras", str(chosen)), backend=chosen)


@overload
def tensorflow(fn: ComputeFunction[P, R], /) -> ComputeFunction[P, R]: ...
@overload
def tensorflow(fn: Callable[P, R], /) -> Callable[P, R]: ...
@overload
def tensorflow() -> _Decorator: ...
def tensorflow(fn: Any = None) -> Any:
    """Run a function under ``@`` with `TF_CONFIG` set to all nodes, for `tf.distribute.MultiWorkerMirroredStrategy`.

    See `torch` for the rest.
    """
    return _decorator(fn, "tensorflow", ("tensorflow",))


@overload
def transformers(fn: ComputeFunction[P, R], /) -> ComputeFunction[P, R]: ...
@overload
def transformers(fn: Callable[P, R], /) -> Callable[P, R]: ...
@overload
def transformers(backend: TorchBackend | None = None) -> _Decorator: ...
def transformers(backend: Any = None) -> Any:
    """Run a function under ``@`` as ranks on which a `transformers.Trainer` trains; see `torch` for the rest."""
    options = {"backend": None if callable(backend) else _chosen(backend, _TORCH_BACKENDS, optional=True)}
    return _decorator(backend, "torch", ("torch", "transformers", "accelerate"), **options)
