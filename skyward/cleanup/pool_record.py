"""A pool's place in the journal and its guardian, kept by the process that owns the pool."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from skyward.cleanup import journal
from skyward.cleanup.guardian import Guardian
from skyward.cleanup.journal import Place
from skyward.errors import PoolError
from skyward.providers.base import Machine

logger = logging.getLogger(__name__)

LAUNCH_S = 1200.0
"""Seconds that a launch may take to end when its pool has ended: one request with all retries, and undoing the rest.

Verda is the slowest: it deletes no machine while it is being provisioned, which is waited for up to 900 s.
"""


class PoolRecord:
    """Made before anything is launched; closed when everything has ended, as far as that can be confirmed.

    `left` says what could not be: then the entry stays in the journal, and the guardian goes on.

    Raises
    ------
    PoolError
        The journal can't be written, or the pool has ended.
    """

    def __init__(
        self,
        pool_id: str,
        provider: str,
        expires: float,
        machines: Sequence[Machine] = (),
        volumes: Mapping[str, str] | None = None,
    ) -> None:
        self.left: Sequence[str] = ()
        self._launches = 0
        self._closed = False
        self._lock = threading.Lock()
        nodes = {machine.id: node for node, machine in enumerate(machines)}
        self._entry = journal.open_entry(
            pool_id, provider=provider, expires=expires, machines=machines, nodes=nodes, volumes=volumes or {}
        )
        try:
            self._guardian = Guardian.start(pool_id)
        except BaseException:
            journal.close(pool_id)  # nothing has been launched yet
            raise

    def add(self, machines: Sequence[Machine]) -> None:
        """Note further machines, before anything is started on them."""
        with self._lock:
            self._write(machines=[*self._entry.machines, *machines])

    @contextlib.contextmanager
    def launching(self, place: Place) -> Iterator[None]:
        """Note, for the time of a block, that machines are launched somewhere."""
        with self._lock:
            new = [] if place in self._entry.places else [place]
            if new or not self._launches:
                self._write(places=[*self._entry.places, *new], launching_until=time.time() + LAUNCH_S)
            self._launches += 1
        try:
            yield
        finally:
            with self._lock:
                self._launches -= 1
                if not self._launches:
                    with contextlib.suppress(PoolError):  # without this note the guardian looks again once too often
                        self._write(launching_until=0.0)

    @property
    def places(self) -> tuple[Place, ...]:
        return self._entry.places

    def number(self, machines: Sequence[Machine], nodes: Sequence[int]) -> None:
        """Note which nodes machines are, in the place of those that were before."""
        with self._lock:
            kept = {machine_id: node for machine_id, node in self._entry.nodes.items() if node not in nodes}
            new = {machine.id: node for machine, node in zip(machines, nodes, strict=True)}
            self._write(nodes=kept | new)

    def lost(self, machine_id: str) -> None:
        """Note that a machine is no node any more."""
        with self._lock:
            if machine_id in self._entry.nodes:
                kept = {other: node for other, node in self._entry.nodes.items() if other != machine_id}
                self._write(nodes=kept)

    def running(self, dashboard_port: int | None = None, scheduler_node: int = 0) -> None:
        """Note that the pool takes calls, and where its dashboard is."""
        with self._lock:
            self._write(state="running", dashboard_port=dashboard_port, scheduler_node=scheduler_node)

    def _write(self, **facts: Any) -> None:
        if self._closed:
            raise PoolError(f"pool {self._entry.pool_id} has ended")
        self._entry = journal.update(self._entry, **facts)

    def close(self) -> None:
        """Close the entry and dismiss the guardian, or leave the rest to it. Nothing is noted afterwards."""
        with self._lock:
            is_left = bool(self.left) and bool(self._entry.machines or self._entry.places)
            if is_left:
                # A launch that was not waited for may go on for as long as one that has just begun.
                until = time.time() + LAUNCH_S if self._launches else 0.0
                with contextlib.suppress(PoolError):  # then the guardian goes by what was noted before
                    self._write(state="stopping", launching_until=until)
            self._closed = True
        if is_left:
            self._guardian.hand_over()
        else:
            journal.close(self._entry.pool_id)
            self._guardian.dismiss()


def note_local(pool_id: str, *, expires: float, folder: str, dashboard_port: int | None) -> None:
    """Note a pool on this computer, so that `skyward ps` shows it. It needs no guardian: its agent ends with it."""
    try:
        if (entry := journal.read(pool_id)) is not None:
            journal.update(entry, dashboard_port=dashboard_port)
            return
        journal.open_entry(
            pool_id, provider="local", expires=expires, state="running", folder=folder, dashboard_port=dashboard_port
        )
    except PoolError as exc:  # nothing is at stake: it is only not listed
        logger.info("`skyward ps` will not list local pool %s: %s", pool_id, exc)
