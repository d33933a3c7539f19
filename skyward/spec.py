"""What a pool is asked to be: images, volumes, allocations and the whole specification, checked when they are made.

Frozen values without I/O. `validation` has the checks; a bad one raises `SpecError` with what would be accepted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, ClassVar

from skyward.accelerators import Accelerator, Auto
from skyward.devices import check_shares
from skyward.validation import (
    Problems,
    check_allocation_share,
    check_apt,
    check_bool,
    check_callback,
    check_choice,
    check_count,
    check_env,
    check_index_url,
    check_pip,
    check_positive,
    check_python,
    check_seconds,
    check_selection,
    check_strings,
    check_text,
    parse_memory,
)

DISPLAYS = ("auto", "log", "spinner", "quiet")
ARCHITECTURES = ("x86_64", "arm64")
SELECTIONS = ("first", "cheapest", "available")
HEARTBEAT_TIMEOUT_S = 120
LEAST_HEARTBEAT_TIMEOUT_S = 10
"""Shorter, and a busy computer or a router that restarts would end pools. Chosen, not measured."""
LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


# --- image --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Image:
    """The environment of a pool's machines.

    Parameters
    ----------
    python
        Version such as ``"3.12"``; None: the caller's.
    pip
        Requirements, as pip takes them: ``["numpy", "torch>=2.2"]``.
    pip_extra_index_url
        One more package index. It wins: a package comes from there if it has a version that fits, and from the default
        index otherwise. With ``UV_INDEX_STRATEGY=first-index`` in the environment of the machine's user, a package that
        it has in any version comes from there only.
    apt
        Debian packages.
    env
        Environment variables of the workers. Their values are kept out of `repr`.
    include
        Files and folders to ship to the working directory.

    Raises
    ------
    SpecError
        A value can't be what it should be, or could reach a shell as more than that.
    """

    python: str | None = None
    pip: Sequence[str] = ()
    pip_extra_index_url: str | None = None
    apt: Sequence[str] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    include: Sequence[str] = ()

    def __post_init__(self) -> None:
        problems = Problems("Image")
        problems.check("python", self.python, check_python)
        pip = problems.check("pip", self.pip, check_pip)
        problems.check("pip_extra_index_url", self.pip_extra_index_url, check_index_url, secret=True)
        apt = problems.check("apt", self.apt, check_apt)
        env = problems.check("env", self.env, check_env, secret=True)
        include = problems.check("include", self.include, _check_include)
        problems.raise_if_any()
        object.__setattr__(self, "pip", pip)
        object.__setattr__(self, "apt", apt)
        object.__setattr__(self, "env", env)
        object.__setattr__(self, "include", include)

    def content_hash(self) -> str:
        """Return 12 hex digits that are equal for images with the same content, in whatever order it is listed."""
        import hashlib  # here, because loading it takes as long as all of this module

        parts = [
            self.python or "",
            "\n".join(sorted(map(_plain, self.pip))),
            self.pip_extra_index_url or "",
            "\n".join(sorted(self.apt)),
            "\n".join(f"{k}={v}" for k, v in sorted(self.env.items())),
            "\n".join(sorted(self.include)),
        ]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]

    def bootstrap(self, ttl: int = 0) -> str:
        """Return the shell script that makes a machine ready for this image: POSIX sh, to be run again at will.

        A pool runs its own, which also pins versions to those that are installed at the caller's.

        Parameters
        ----------
        ttl
            Seconds after which the machine switches itself off, whatever happens; 0: never. With a limit the script
            also stops Debian's timers for upgrades.
        """
        import sys

        from skyward.bootstrap import image_recipe, script

        problems = Problems()
        problems.check("ttl", ttl, check_count(0))
        problems.raise_if_any()
        return script(image_recipe(self, f"{sys.version_info[0]}.{sys.version_info[1]}"), ttl_s=ttl, lives_on=not ttl)

    def __hash__(self) -> int:
        return hash(self.content_hash())

    def __reduce__(self) -> Any:
        return Image, (self.python, self.pip, self.pip_extra_index_url, self.apt, dict(self.env), self.include)

    def __repr__(self) -> str:
        shown = {
            "python": self.python, "pip": self.pip, "apt": self.apt, "env": sorted(self.env), "include": self.include
        }  # fmt: skip
        return f"Image({', '.join(f'{k}={v!r}' for k, v in shown.items() if v)})"


def _plain(requirement: str) -> str:
    """Return a requirement without spaces, its name as package indexes compare names (PEP 503)."""
    import re

    name, rest = re.fullmatch(r"([A-Za-z0-9._-]*)(.*)", "".join(requirement.split())).groups()  # type: ignore[union-attr]
    return re.sub(r"[-_.]+", "-", name).lower() + rest


def _check_include(value: Any) -> tuple[str, ...]:
    paths = check_strings(value)
    for path in paths:
        if not path.strip() or not path.isprintable() or path.startswith("-"):
            raise ValueError(f"paths of files and folders, which {path!r} is not")
    return paths


# --- volumes ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Volume:
    """Storage that is mounted at `mount_path` on every machine, from the first call to the last."""

    mount_path: str

    def __post_init__(self) -> None:
        problems = Problems(type(self).__name__)
        path = problems.check("mount_path", self.mount_path, _check_mount_path)
        problems.raise_if_any()
        object.__setattr__(self, "mount_path", path)


def _is_plain(text: str) -> bool:
    """Tell whether a shell would see nothing in `text` but a word."""
    return text.isprintable() and not text.startswith("-") and not any(c in text for c in "'\"\\$`;&|<>*?()[]{}!#~")


# Where a machine's own files are: a volume over them, or inside of what the system makes by itself, ends the machine.
_SYSTEM_FOLDERS = (
    "bin", "boot", "dev", "etc", "lib", "lib32", "lib64", "libx32", "proc", "run", "sbin", "sys", "usr", "var"
)  # fmt: skip
_TAKEN_FOLDERS = ("/home", "/root", "/tmp")


def _check_mount_path(value: Any) -> str:
    path = check_text(value).rstrip("/")
    parts = path[1:].split("/")
    if not path.startswith("/") or not _is_plain(path) or any(part in ("", ".", "..") for part in parts):
        raise ValueError("an absolute path such as '/data', without quotes or shell characters")
    if parts[0] in _SYSTEM_FOLDERS or path in _TAKEN_FOLDERS:
        raise ValueError("a folder of its own such as '/data', not one that the system needs")
    return path


def _parts(prefix: str) -> list[str]:
    inner = prefix.strip("/")
    return inner.split("/") if inner else []


def _check_prefix(value: Any) -> str:
    if not isinstance(value, str) or not _is_plain(value) or any(p in ("", ".", "..") for p in _parts(value)):
        raise ValueError("a text such as 'datasets/2024/', without quotes or shell characters")
    return value


@dataclass(frozen=True, slots=True)
class S3Volume(Volume):
    """A bucket, or what lies under `prefix` in it, as a folder.

    `endpoint_url` is for services that speak S3's protocol. What calls have written is sent before a machine ends, for
    as long as that makes progress; what can't be sent raises `VolumeError` at the end of the block.
    """

    bucket: str = ""
    prefix: str = ""
    read_only: bool = True
    endpoint_url: str | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        problems = Problems("S3Volume")
        path = problems.check("mount_path", self.mount_path, _check_mount_path)
        problems.check("bucket", self.bucket, _check_bucket)
        problems.check("prefix", self.prefix, _check_prefix)
        problems.check("read_only", self.read_only, check_bool)
        problems.check("endpoint_url", self.endpoint_url, check_index_url)
        problems.raise_if_any()
        object.__setattr__(self, "mount_path", path)


def _check_bucket(value: Any) -> str:
    import re

    # Rules of bucket names: Amazon S3 User Guide, "General purpose bucket naming rules".
    if not isinstance(value, str) or not re.fullmatch(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]", value):
        raise ValueError("a bucket's name: 3 to 63 lower-case letters, digits, dots and dashes")
    return value


# --- allocation ---------------------------------------------------------------------------------------------

_KINDS = ("always-spot", "spot-if-available", "on-demand", "cheapest", "percent")


@dataclass(frozen=True, slots=True)
class Allocation:
    """How many of the nodes are spot machines, which cost less and may be taken away.

    Made by ``Allocation.AlwaysSpot()``, ``.SpotIfAvailable()``, ``.OnDemand()``, ``.Cheapest()`` and
    ``.Percent(spot=0.8)``, or by `parse`.
    """

    kind: str
    spot: float = 0.0

    def __post_init__(self) -> None:
        problems = Problems("Allocation")
        problems.check("kind", self.kind, check_choice(_KINDS))
        problems.check("spot", self.spot, check_allocation_share)
        problems.raise_if_any()

    def __call__(self) -> Allocation:
        """Return itself, so that ``Allocation.OnDemand`` and ``Allocation.OnDemand()`` are the same."""
        return self

    AlwaysSpot: ClassVar[Allocation]
    SpotIfAvailable: ClassVar[Allocation]
    OnDemand: ClassVar[Allocation]
    Cheapest: ClassVar[Allocation]

    @classmethod
    def Percent(cls, spot: float) -> Allocation:  # noqa: N802 - beside its siblings
        """Return an allocation with at least the share `spot` (0 to 1) of spot machines, in whole nodes."""
        problems = Problems("Allocation.Percent")
        problems.check("spot", spot, check_allocation_share)
        problems.raise_if_any()
        return cls("percent", float(spot))

    @classmethod
    def parse(cls, value: str | float | Allocation) -> Allocation:
        """Return what ``"always-spot"``, ``"spot-if-available"``, ``"on-demand"``, ``"cheapest"`` or a share means.

        Raises
        ------
        SpecError
            None of these.
        """
        problems = Problems()
        found = problems.check("allocation", value, _check_allocation)
        problems.raise_if_any()
        assert isinstance(found, Allocation)
        return found

    def spot_nodes(self, nodes: int) -> int:
        """Return how many of `nodes` must be spot machines, at least."""
        if self.kind == "always-spot":
            return nodes
        return math.ceil(round(self.spot * nodes, 9))


Allocation.AlwaysSpot = Allocation("always-spot", 1.0)
Allocation.SpotIfAvailable = Allocation("spot-if-available")
Allocation.OnDemand = Allocation("on-demand")
Allocation.Cheapest = Allocation("cheapest")
_ALLOCATIONS = {
    a.kind: a for a in (Allocation.AlwaysSpot, Allocation.SpotIfAvailable, Allocation.OnDemand, Allocation.Cheapest)
}


def _check_allocation(value: Any) -> Allocation:
    if isinstance(value, Allocation):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return Allocation("percent", check_allocation_share(value))
    return _ALLOCATIONS[check_choice(tuple(_ALLOCATIONS), "a share of spot machines from 0 to 1")(value)]


# --- machines -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class InstanceSpec:
    """A type of machine that a provider offers.

    `memory_gb` is what the provider lists; AWS and DigitalOcean write GB and mean GiB. Prices are in USD per hour;
    None: not known, or not offered.
    """

    name: str
    vcpu: int
    memory_gb: float
    accelerator: str | None = None
    accelerator_count: int = 0
    accelerator_memory_gb: float = 0
    price_on_demand: float | None = None
    price_spot: float | None = None
    billing_increment_minutes: int | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """A machine of a pool."""

    id: str
    provider: str
    spot: bool = False
    private_ip: str | None = None
    public_ip: str | None = None
    node: int = 0
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def is_head(self) -> bool:
        """Whether this is node 0, where the scheduler runs."""
        return self.node == 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ExitedInstance(Instance):
    """A machine that is gone, and why."""

    reason: str = ""


# --- logging ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LogConfig:
    """Where the pool's log goes. `rotation` is the size at which a file is put aside, `retention` how many stay.

    `prefix`: whether lines that calls print are shown with ``[node 0]`` before them.
    """

    level: str = "INFO"
    file: str | None = None
    console: bool = True
    rotation: str | int = "50 MB"
    retention: int = 10
    prefix: bool = True

    def __post_init__(self) -> None:
        problems = Problems("LogConfig")
        problems.check("level", self.level, check_choice(LEVELS))
        problems.check("file", self.file, check_text, optional=True)
        problems.check("console", self.console, check_bool)
        problems.check("rotation", self.rotation, parse_memory)
        problems.check("retention", self.retention, check_count(1))
        problems.check("prefix", self.prefix, check_bool)
        problems.raise_if_any()


# --- the whole ----------------------------------------------------------------------------------------------


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

        def settle(option: str, check: Callable[[Any], Any], *, optional: bool = False, secret: bool = False) -> None:
            value = getattr(self, option)
            value = None if value is Auto and optional else value
            settled = problems.check(option, value, check, optional=optional, secret=secret)
            object.__setattr__(self, option, settled)

        settle("selection", check_selection(SELECTIONS))
        settle("image", _check_type(Image, "an sky.Image"))
        settle("nodes", check_count(1))
        settle("machine", check_text, optional=True)
        settle("accelerator", Accelerator.parse, optional=True)
        settle("architecture", check_choice(ARCHITECTURES), optional=True)
        settle("cpu", check_count(1), optional=True)
        settle("memory", parse_memory, optional=True)
        settle("volume", _check_volumes)
        settle("allocation", _check_allocation)
        settle("timeout", check_positive("seconds"))
        settle("env", check_env, optional=True, secret=True)
        settle("concurrency", check_count(1))
        settle("display", check_choice(DISPLAYS))
        settle("on_event", check_callback, optional=True)
        settle("collect_metrics", check_bool)
        settle("logging", _check_type(LogConfig, "an sky.LogConfig"), optional=True)
        settle("max_price", check_positive("USD per hour"), optional=True)
        settle("max_cost", check_positive("USD"), optional=True)
        settle("idle_timeout", check_positive("seconds"), optional=True)
        settle("boot_timeout", check_positive("seconds"), optional=True)
        settle("heartbeat_timeout", check_seconds(LEAST_HEARTBEAT_TIMEOUT_S))
        settle("retries", check_count(0))
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
        raise ValueError("volumes with a mount_path of their own each")
    return tuple(volumes)

