"""Large arrays that workers write into: each in a file of its own, not found by content."""

from __future__ import annotations

import pickle
import sys
import uuid
import weakref
from typing import Any

from skyward.engine.store import Store
from skyward.wire import BlobRef


class WritableArrays:
    """Gives each array of more than `over` bytes its own file, until it is gone or this is closed.

    What the caller changes in the array afterwards does not reach the file.
    """

    def __init__(self, store: Store, *, over: int) -> None:
        self._store = store
        self._over = over
        self._known: dict[tuple[int, int, int], tuple[weakref.ref[Any], BlobRef]] = {}
        self._kept: list[BlobRef] = []

    def close(self) -> None:
        """Let the files go when no unfinished call needs them."""
        self._store.release(self._kept)
        self._kept.clear()
        self._known.clear()

    def put(self, buffer: pickle.PickleBuffer) -> BlobRef:
        """Store `buffer`, or count one more use of it: see `Store.put`."""
        view = buffer.raw()
        if view.nbytes <= self._over:
            return self._store.put(view)
        owner: Any = view.obj
        numpy = sys.modules.get("numpy")
        if numpy is None or not isinstance(owner, numpy.ndarray):
            return self._store.put(view, digest=uuid.uuid4().hex)
        address = owner.__array_interface__["data"][0]
        while isinstance(owner.base, numpy.ndarray):  # what is pickled may be a view that was made for that
            owner = owner.base
        key = (id(owner), address, view.nbytes)
        array, ref = self._known.get(key, (None, None))
        if array is not None and ref is not None and array() is owner:
            self._store.reuse((ref,))
            return ref
        ref = self._store.put(view, digest=uuid.uuid4().hex)
        self._store.reuse((ref,))
        self._kept.append(ref)
        forget = self._known.pop
        self._known[key] = (weakref.ref(owner, lambda _: forget(key, None)), ref)
        return ref
