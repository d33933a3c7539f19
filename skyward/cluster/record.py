"""A pool's place in the journal and its guardian, kept by the process that owns the pool."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from skyward.cluster import journal
from skyward.cluster.guardian import Guardian
from skyward.cluster.journal import Place
from skyward.providers.base import Machine


class Record:
    """Made before anything is launched; closed when everything has ended, as far as that can be confirmed.

    `left` says what could not be: then the entry stays in the journal, and the guardian goes on.

    Raises
    ------
    PoolError
        The journal can't be written.
    """

    def __init__(self, pool_id: str, provider: str, expires: float, machines: Sequence[Machine] = ()) -> None:
        self.left: Sequence[str] = ()
        self._lock = threading.Lock()
        self._entry = journal.open_entry(pool_id, provider=provider, expires=expires, machines=machines)
        try:
            self._guardian = Guardian.start(pool_id)
        except BaseException:
            journal.close(pool_id)  # nothing has been launched yet
            raise

    def add(self, machines: Sequence[Machine]) -> None:
        """Note further machines, before anything is started on them."""
        with self._lock:
            self._entry = journal.update(self._entry, machines=[*self._entry.machines, *machines])

    def add_place(self, place: Place) -> None:
        """Note where a cloud is about to be asked for machines."""
        with self._lock:
            if place not in self._entry.places:
                self._entry = journal.update(self._entry, places=[*self._entry.places, place])

    @property
    def places(self) -> tuple[Place, ...]:
        return self._entry.places

    def running(self) -> None:
        """Note that the pool takes calls."""
        with self._lock:
            self._entry = journal.update(self._entry, state="running")

    def close(self) -> None:
        """Close the entry and dismiss the guardian, or leave the rest to it."""
        if self.left:
            self._entry = journal.update(self._entry, state="stopping")
            self._guardian.hand_over()
        else:
            journal.close(self._entry.pool_id)
            self._guardian.dismiss()
