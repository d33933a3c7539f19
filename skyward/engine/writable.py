"""Large arrays that workers write into: each in its own file, not found by content."""

from __future__ import annotations

import uuid
import weakref
from typing import Any

from skyward.engine.store import Store
from skyward.transfer.arrays import Memory
from skyward.transfer.pickling import Buffer
from skyward.transfer.wire import BlobRef


class WritableArrays:
    """Gives each array of more than `over` bytes its own file, until it is gone or this is closed.

    What the caller changes in the array afterwards does not reach the file.
    """

    def __init__(self, store: Store, *, over: int) -> None:
        self._store = store
        self._over = over
        self._known: dict[tuple[int, tuple[Any, ...]], tuple[weakref.ref[Any], BlobRef]] = {}
        self._kept: list[BlobRef] = []

    def close(self) -> None:
        """Let the files go when no unfinished call needs them."""
        self._store.release(self._kept)
        self._kept.clear()
        self._known.clear()

    def put(self, buffer: Buffer) -> BlobRef:
        """Store `buffer`, or count one more use of it: see `Store.put`."""
        if not isinstance(buffer, Memory):
            view = buffer.raw()
            is_fixed = view.nbytes <= self._over or type(view.obj) is bytes
            return self._store.put(view, digest=None if is_fixed else uuid.uuid4().hex)
        if buffer.nbytes <= self._over:
            return self._store.put(buffer)
        owner = buffer.owner
        key = (id(owner), buffer.place)
        array, ref = self._known.get(key, (None, None))
        if array is not None and ref is not None and array() is owner:
            self._store.reuse((ref,))
            return ref
        ref = self._store.put(buffer, digest=uuid.uuid4().hex)
        self._store.reuse((ref,))
        self._kept.append(ref)
        forget = self._known.pop
        self._known[key] = (weakref.ref(owner, lambda _: forget(key, None)), ref)
        return ref
