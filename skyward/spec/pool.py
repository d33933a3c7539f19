"""What a pool is asked to be, as one frozen value without I/O.

`validation` has the checks; a bad option raises `SpecError` with what would be accepted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

from skyward.accelerators.devices import check_shares
from skyward.accelerators.model import Accelerator, Auto
from skyward.spec.allocation import Allocation, check_allocation
from skyward.spec.image import Image
from skyward.spec.log import LogConfig
from skyward.spec.validation import (
    Problems,
    check_bool,
    check_callback,
    check_choice,
    check_count,
    check_env,
    check_positive,
    check_seconds,
    check_selection,
    check_text,
    parse_memory,
)
from skyward.spec.volume import Volume

DISPLAYS = ("auto", "log", "spinner", "quiet")
ARCHITECTURES = ("x86_64", "arm64")
SELECTIONS = ("first", "cheapest", "available")
HEARTBEAT_TIMEOUT_S = 120
LEAST_HEARTBEAT_TIMEOUT_S = 10
"""Shorter, and a busy computer or a router that restarts would end pools. Chosen, not measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolSpec:
    """Every option of a pool but the provider, checked and brought into one form.

    `memory` is in MB (10⁶ bytes), times are in seconds, prices in USD.

    Raises
    ------
    SpecError
        Some options can't work: the message has a line for each; `errors` are the single errors.
    """

    selection: str | Callable[..., Any] = "first"
    image: Image = field(default_factory=Image)
    nodes: int = 1
    machine: str | None = None
    accelerator: Accelerator | None = None
    architecture: str | None = None
    cpu: int | None = None
    memory: int | None = None
    volume: tuple[Volume, ...] = ()
    allocation: Allocation = Allocation.SpotIfAvailable
    timeout: float = 3600
    env: Mapping[str, str] | None = field(default=None, repr=False, hash=False)  # values may be secrets
    concurrency: int = 1
    display: str = "auto"
    on_event: Callable[..., Any] | None = None
    collect_metrics: bool = True
    logging: LogConfig | None = None
    max_price: float | None = None
    max_cost: float | None = None
    idle_timeout: float | None = None
    boot_timeout: float | None = None
    heartbeat_timeout: float = HEARTBEAT_TIMEOUT_S
    retries: int = 3

    def __post_init__(self) -> None:
        problems = Problems()
        for option in fields(self):
            value, optional = getattr(self, option.name), option.default is None
            value = None if value is Auto and optional else value
            secret = not option.repr
            checked = problems.check(option.name, value, CHECKS[option.name], optional=optional, secret=secret)
            object.__setattr__(self, option.name, checked)
        problems.raise_if_any()
        if self.heartbeat_timeout > self.timeout:
            if self.heartbeat_timeout != HEARTBEAT_TIMEOUT_S:  # the default gives way
                problems.note("heartbeat_timeout", self.heartbeat_timeout, f"at most timeout={self.timeout:g}")
                problems.raise_if_any()
            object.__setattr__(self, "heartbeat_timeout", self.timeout)
        if self.accelerator is not None:
            problems.check("concurrency", self.concurrency, self._check_shares)
            problems.raise_if_any()

    def _check_shares(self, slots: int) -> int:
        assert self.accelerator is not None
        check_shares(self.accelerator, slots, self.environment)
        return slots

    @property
    def environment(self) -> dict[str, str]:
        """Variables of the workers: the image's, and the pool's own before them."""
        return {**self.image.env, **(self.env or {})}

    @property
    def parts_per_node(self) -> int:
        """How many workers a node is to a broadcast: its MIG partitions, or 1."""
        return (self.accelerator.partitions if self.accelerator else 0) or 1

    @property
    def slots_per_node(self) -> int:
        """How many worker processes a node has: `concurrency`, for each MIG partition where there are some."""
        return self.parts_per_node * self.concurrency

    def __reduce__(self) -> Any:
        options = {f.name: getattr(self, f.name) for f in fields(self)}
        # The view that keeps `env` from being changed can't be pickled; it is made anew.
        return partial(PoolSpec, **{**options, "env": None if self.env is None else dict(self.env)}), ()


def _check_type(kind: type, accepted: str) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        if not isinstance(value, kind):
            raise ValueError(accepted)
        return value

    return check


def _check_volumes(value: Any) -> tuple[Volume, ...]:
    volumes = (value,) if isinstance(value, Volume) else value
    if not isinstance(volumes, Sequence) or not all(isinstance(v, Volume) for v in volumes):
        raise ValueError("an sky.S3Volume, or a list of them")
    paths = [v.mount_path for v in volumes]
    if len(set(paths)) < len(paths):
        raise ValueError("a different mount_path for each volume")
    return tuple(volumes)


CHECKS: Mapping[str, Callable[[Any], Any]] = {
    "selection": check_selection(SELECTIONS),
    "image": _check_type(Image, "an sky.Image"),
    "nodes": check_count(1),
    "machine": check_text,
    "accelerator": Accelerator.parse,
    "architecture": check_choice(ARCHITECTURES),
    "cpu": check_count(1),
    "memory": parse_memory,
    "volume": _check_volumes,
    "allocation": check_allocation,
    "timeout": check_positive("seconds"),
    "env": check_env,
    "concurrency": check_count(1),
    "display": check_choice(DISPLAYS),
    "on_event": check_callback,
    "collect_metrics": check_bool,
    "logging": _check_type(LogConfig, "an sky.LogConfig"),
    "max_price": check_positive("USD per hour"),
    "max_cost": check_positive("USD"),
    "idle_timeout": check_positive("seconds"),
    "boot_timeout": check_positive("seconds"),
    "heartbeat_timeout": lambda value: check_seconds(LEAST_HEARTBEAT_TIMEOUT_S)(value),  # tests have less
    "retries": check_count(0),
}
"""The check of each option. Returns its value in one form, or raises `ValueError` with what is accepted."""
