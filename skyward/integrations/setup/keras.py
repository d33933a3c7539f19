"""Keras 3 on a backend, data-parallel over all participants. Imports keras when it is asked for."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterator
from typing import Any

from skyward.errors import SpecError
from skyward.integrations.setup import jax, tensorflow, torch
from skyward.integrations.setup.loading import load
from skyward.worker.context import World
from skyward.worker.variables import variables

_SEED = 42
"""Where all ranks begin."""


@contextlib.contextmanager
def session(world: World, backend: str) -> Iterator[None]:
    """Set Keras up on `backend`, with whatever that needs to know of the others."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(variables({"KERAS_BACKEND": backend}))
        match backend:
            case "jax":
                stack.enter_context(jax.session(world))
            case "torch":
                stack.enter_context(torch.session(world, backend=None))
            case _:
                stack.enter_context(tensorflow.session(world))
        keras = _load(backend)
        if world.size > 1:
            keras.utils.set_random_seed(_SEED)
            if backend == "jax":
                devices = load("jax").devices()
                layout = keras.distribution.DataParallel(devices=[_name(d) for d in devices], auto_shard_dataset=False)
                keras.distribution.set_distribution(layout)
            elif backend == "torch":
                _average_gradients(keras)
        yield


def _load(backend: str) -> Any:
    before = sys.modules.get("keras")
    keras = before or load("keras")
    if keras.backend.backend() != backend:  # only where other calls have run in this process before
        raise SpecError(
            f"backend={backend!r}: Keras runs on {keras.backend.backend()!r} in this worker since an earlier call, and "
            f"can't change. Use a separate pool, or send it with @, which gives every job new processes",
            option="backend",
            value=backend,
            accepted=repr(keras.backend.backend()),
        )
    return keras


def _name(device: Any) -> str:
    return f"{device.platform}:{device.id}"


def _average_gradients(keras: Any) -> None:
    """Let every optimizer of this process apply the mean of all ranks' gradients."""
    dist = load("torch.distributed")
    apply = keras.optimizers.Optimizer.apply

    @functools.wraps(apply)
    def apply_mean(self: Any, grads: Any, trainable_variables: Any = None) -> Any:
        for gradient in grads:
            if gradient is not None:
                dist.all_reduce(gradient)
                gradient /= dist.get_world_size()
        return apply(self, grads, trainable_variables)

    keras.optimizers.Optimizer.apply = apply_mean
