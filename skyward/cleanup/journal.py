"""What exists, on disk, before it exists: one file per pool, from before its launch until its end is confirmed.

A process that is killed leaves its entry behind, by which others can end the pool: the guardian, or
``skyward down``. Knows machines as facts only; ending them is in `end`.
"""

from __future__ import annotations

import dataclasses
import getpass
import json
import logging
import os
import re
import socket
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import psutil

from skyward.errors import PoolError
from skyward.paths import data_folder
from skyward.providers.base import Login, Machine

logger = logging.getLogger(__name__)

State = Literal["launching", "running", "stopping"]

# The id becomes part of paths, here and on machines. Never so short that it begins another one.
_POOL_ID = re.compile(r"[0-9a-z]{8,32}")
_SAME_START_S = 5.0
"""How far apart two readings of one process's start may be. Chosen, not measured: the system derives it from a clock
that is set."""
_writing = threading.Lock()

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where machines of a pool may be: a region of a cloud, and what makes a provider that reaches it."""

    provider: str
    region: str
    settings: Mapping[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """What the journal knows of one pool.

    Attributes
    ----------
    created, expires
        Seconds since the epoch. By `expires` the pool's own timers have ended it.
    pid, pid_started, host
        The process that owns the pool. Its start tells it from a later one with the same number. No `pid`: not
        known, because the pool was found by its machines in a cloud, not in the journal.
    owner
        Who has started it, as ``user@host``.
    machines
        All that are known. Private keys are paths here, never the keys themselves.
    places
        Where clouds were asked for machines: there may be some that are not known.
    launching_until
        Until when clouds may still make machines that they were asked for, in seconds since the epoch; 0: no launch is
        under way.
    nodes
        Which node a machine is, by its id; machines that are lost are left out.
    dashboard_port
        Where the Dask dashboard listens, on the loopback of the scheduler's node; None: not known, or not yet.
    scheduler_node
        The node that has the scheduler.
    folder
        Of a local pool: what ends with it.
    volumes
        Where volumes that may be written to are kept, by their paths on the machines: their data is sent at the end.
    """

    pool_id: str
    provider: str
    created: float
    expires: float
    pid: int
    pid_started: float
    host: str
    owner: str = ""
    state: State = "launching"
    machines: tuple[Machine, ...] = ()
    places: tuple[Place, ...] = ()
    launching_until: float = 0.0
    nodes: Mapping[str, int] = field(default_factory=dict, hash=False)
    dashboard_port: int | None = None
    scheduler_node: int = 0
    folder: str = ""
    volumes: Mapping[str, str] = field(default_factory=dict, hash=False)

    @property
    def owner_alive(self) -> bool | None:
        """Whether the process that owns the pool still runs; None where that can't be seen: it is on another host."""
        if self.host != socket.gethostname() or not self.pid:
            return None
        started = _start_of(self.pid)
        return started is not None and abs(started - self.pid_started) < _SAME_START_S

    @property
    def is_expired(self) -> bool:
        return time.time() >= self.expires

    def machine(self, node: int) -> Machine | None:
        """Return the machine that is node `node`."""
        # Nobody has numbered the machines of a pool that clouds know of.
        nodes = self.nodes or {machine.id: number for number, machine in enumerate(self.machines)}
        return next((machine for machine in self.machines if nodes.get(machine.id) == node), None)


def this_owner() -> str:
    """Return who starts machines here, as ``user@host``."""
    return f"{getpass.getuser()}@{socket.gethostname()}"


def open_entry(
    pool_id: str, *, provider: str, expires: float, machines: Sequence[Machine] = (), **facts: Any
) -> Entry:
    """Write down that this process is about to launch a pool. On disk, power cut or not, when this returns.

    `facts` are fields of `Entry`.

    Raises
    ------
    PoolError
        The journal can't be written. Launching anyway could leave machines that no record names.
    """
    pid = os.getpid()
    entry = Entry(
        pool_id=pool_id, provider=provider, created=time.time(), expires=expires, pid=pid,
        pid_started=_start_of(pid) or 0.0, host=socket.gethostname(), owner=this_owner(), machines=tuple(machines),
        **facts,
    )  # fmt: skip
    return _put(entry)


def update(
    entry: Entry,
    *,
    state: State | None = None,
    machines: Sequence[Machine] | None = None,
    places: Sequence[Place] | None = None,
    launching_until: float | None = None,
    nodes: Mapping[str, int] | None = None,
    dashboard_port: int | None = None,
    scheduler_node: int | None = None,
) -> Entry:
    """Write `entry` with what has changed, and return it so. Only the pool's owner does.

    Raises
    ------
    PoolError
        The journal can't be written, or has no entry of the pool any more: another process has ended it.
    """
    entry = replace(
        entry,
        state=state or entry.state,
        machines=entry.machines if machines is None else tuple(machines),
        places=entry.places if places is None else tuple(places),
        launching_until=entry.launching_until if launching_until is None else launching_until,
        nodes=entry.nodes if nodes is None else dict(nodes),
        dashboard_port=entry.dashboard_port if dashboard_port is None else dashboard_port,
        scheduler_node=entry.scheduler_node if scheduler_node is None else scheduler_node,
    )
    return _put(entry, must_exist=True)


def _put(entry: Entry, *, must_exist: bool = False) -> Entry:
    path = _path(entry.pool_id)
    with _writing:
        if must_exist and not path.exists():
            raise PoolError(f"pool {entry.pool_id} was ended by another process, such as `skyward down`")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.parent.chmod(0o700)
            entry = replace(entry, machines=_without_keys(entry))
            _write(path, json.dumps(dataclasses.asdict(entry), indent=1))
        except OSError as exc:
            raise PoolError(
                f"the journal of pools can't be written at {path}: {exc.strerror or exc}. "
                "Set SKYWARD_DATA_DIR to a folder that can be written to"
            ) from exc
    return entry


def close(pool_id: str) -> None:
    """Forget a pool whose end is confirmed, and its keys. May be called twice."""
    path = _path(pool_id)
    with _writing:
        for other in path.parent.glob(f"{pool_id}.*"):
            if other != path:
                other.unlink(missing_ok=True)
        path.unlink(missing_ok=True)  # last: as long as anything is left, it is listed


def read(pool_id: str) -> Entry | None:
    """Return what is known of a pool; None when there is nothing.

    Raises
    ------
    ValueError
        Its file can't be understood.
    """
    try:
        return _from_json(_path(pool_id).read_text(), pool_id)
    except FileNotFoundError:
        return None


def entries() -> list[Entry]:
    """Return every pool on record, oldest first. A file that can't be read is logged and left out."""
    found = []
    for path in data_folder().glob("pools/*.json"):
        try:
            found.append(_from_json(path.read_text(), path.stem))
        except FileNotFoundError:
            pass  # closed just now
        except (OSError, ValueError) as exc:
            logger.warning("%s can't be read, and its pool may still run: %s", path, exc)
    return sorted(found, key=lambda entry: entry.created)


def known_hosts(pool_id: str, name: str, host_key: str) -> Path:
    """Return the path of a file of known hosts that has a pinned key under `name`; it ends with the pool's entry.

    For other programs: ours have the key from the entry.
    """
    path = _path(pool_id).with_suffix(".known_hosts")
    # Of another name for each process: several may log in at once.
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f"{pool_id}.", delete=False) as file:
        file.write(f"{name} {host_key.strip()}\n")
    Path(file.name).replace(path)
    return path


def _path(pool_id: str) -> Path:
    if not _POOL_ID.fullmatch(pool_id):
        raise ValueError(f"not the id of a pool: {pool_id!r}")
    return data_folder() / "pools" / f"{pool_id}.json"


def _without_keys(entry: Entry) -> tuple[Machine, ...]:
    """Return the machines with paths for keys: a key that is given as text gets its own file, once."""
    files: dict[str, str] = {}
    machines = []
    for machine in entry.machines:
        login = machine.login
        key = login.key
        if key is not None and "PRIVATE KEY" in key:
            if key not in files:
                suffix = f".{len(files)}.key" if files else ".key"
                path = _path(entry.pool_id).with_suffix(suffix)
                _write(path, key)
                files[key] = str(path)
            key = files[key]
        login = replace(login, key=_absolute(key), known_hosts=_absolute(login.known_hosts))
        machines.append(replace(machine, login=login))
    return tuple(machines)


def _absolute(path: str | None) -> str | None:
    """Return the path for readers in other folders."""
    return None if path is None else str(Path(path).expanduser().absolute())


def _write(path: Path, text: str) -> None:
    """Put `text` in place all at once, for this user only, and wait until it is on disk."""
    new = path.with_suffix(f"{path.suffix}.new")
    new.unlink(missing_ok=True)
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _from_json(text: str, pool_id: str) -> Entry:
    try:
        data = json.loads(text)
        machines = tuple(
            _known(Machine, {**machine, "login": _known(Login, machine["login"])}) for machine in data["machines"]
        )
        places = tuple(_known(Place, place) for place in data.get("places", ()))
        entry = _known(Entry, {**data, "machines": machines, "places": places})
        right = entry.pool_id == pool_id and entry.state in get_args(State)
        for number in (entry.created, entry.expires, entry.pid, entry.pid_started):
            right &= isinstance(number, (int, float))
    except (TypeError, KeyError, AttributeError) as exc:
        raise ValueError(f"not an entry of the journal: {exc!r}") from exc
    if not right:
        raise ValueError("not an entry of the journal")
    return entry


def _known(kind: type[T], data: dict[str, Any]) -> T:
    """Make a `kind` of the fields that it has: a later version may have written more."""
    names = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type] # all are dataclasses
    lists = {name: tuple(value) for name, value in data.items() if isinstance(value, list)}  # as JSON has tuples
    return kind(**{name: value for name, value in {**data, **lists}.items() if name in names})


def _start_of(pid: int) -> float | None:
    """Return when a process started, in seconds since the epoch; None when it has ended."""
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else float(process.create_time())
    except psutil.NoSuchProcess:
        return None
