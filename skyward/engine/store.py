"""Large buffers, once per node: kept as files in shared memory where caller and workers share a host."""

from __future__ import annotations

import contextlib
import os
import pickle
import sys
import tempfile
import threading
import weakref
from collections import OrderedDict
from pathlib import Path
from typing import Any

import xxhash

from skyward.wire import BlobRef


class Store:
    """Keeps each distinct buffer once, by content.

    With a `folder` that workers can read, a buffer becomes a file that they map; otherwise it is kept here until
    the engine has put it on the cluster. Buffers that no unfinished call needs are dropped, oldest first, once
    the store holds more than `keep_bytes`. Safe to use from several threads.
    """

    def __init__(self, folder: Path | None, *, keep_bytes: int | None = None) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        self._sizes: OrderedDict[str, int] = OrderedDict()  # least recently used first
        self._uses: dict[str, int] = {}
        self._data: dict[str, bytes] = {}
        self._total = 0
        self._keep_bytes = _default_keep(folder) if keep_bytes is None else keep_bytes
        self.dropped: list[str] = []  # digests whose copies on the cluster may go; the engine empties it
        self.writes = 0  # buffers hashed to something new and stored

    def put(self, buffer: pickle.PickleBuffer | memoryview) -> BlobRef:
        """Store `buffer` unless it is known, and count one use of it; `release` ends the use."""
        view = buffer.raw() if isinstance(buffer, pickle.PickleBuffer) else buffer
        digest = xxhash.xxh3_128_hexdigest(view)
        with self._lock:
            if digest not in self._sizes:
                self._write(digest, view)
                self._sizes[digest] = view.nbytes
                self._total += view.nbytes
                self.writes += 1
            return self._use(digest)

    def again(self, digest: str) -> BlobRef | None:
        """Count one more use of a buffer that is still here; None when it is not."""
        with self._lock:
            return self._use(digest) if digest in self._sizes else None

    def _use(self, digest: str) -> BlobRef:
        self._uses[digest] = self._uses.get(digest, 0) + 1
        self._sizes.move_to_end(digest)
        path = str(self.folder / digest) if self.folder else None
        return BlobRef(digest, self._sizes[digest], path)

    def release(self, refs: tuple[BlobRef, ...]) -> None:
        with self._lock:
            for ref in refs:
                self._uses[ref.digest] -= 1
            if self._total > self._keep_bytes:
                self._drop_unused()

    def data(self, digest: str) -> bytes:
        return self._data[digest]

    def close(self) -> None:
        """Remove every file. Workers that have mapped one keep what they mapped."""
        with self._lock:
            for digest in list(self._sizes):
                self._drop(digest)

    def _drop_unused(self) -> None:
        for digest in [d for d in self._sizes if not self._uses.get(d)]:
            self._drop(digest)
            if self._total <= self._keep_bytes:
                return

    def _drop(self, digest: str) -> None:
        self._total -= self._sizes.pop(digest)
        self._uses.pop(digest, None)
        self._data.pop(digest, None)
        self.dropped.append(digest)
        if self.folder:
            with contextlib.suppress(FileNotFoundError):
                (self.folder / digest).unlink()

    def _write(self, digest: str, view: memoryview) -> None:
        if self.folder is None:
            self._data[digest] = bytes(view)
            return
        # Written under another name first: a worker never maps half a file.
        fd, name = tempfile.mkstemp(dir=self.folder)
        try:
            with os.fdopen(fd, "wb", buffering=0) as file:
                done = 0
                while done < view.nbytes:
                    done += file.write(view[done : done + (1 << 28)])
            Path(name).rename(self.folder / digest)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


def _default_keep(folder: Path | None) -> int:
    if folder is None:
        return 1 << 30
    stat = os.statvfs(folder)
    return stat.f_bavail * stat.f_frsize // 4


class Keeper:
    """Recognises a buffer of the same object again within one group, so that it is hashed once.

    Only within a group: between two runs the caller may have changed the array in place.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._known: dict[int, tuple[weakref.ref[Any], int, str]] = {}

    def put(self, buffer: pickle.PickleBuffer) -> BlobRef:
        view = buffer.raw()
        owner = view.obj
        known = self._known.get(id(owner))
        if known is not None and known[0]() is owner and known[1] == view.nbytes:
            again = self._store.again(known[2])
            if again is not None:
                return again
        ref = self._store.put(view)
        # Only a numpy array is its buffer and nothing else: other owners may lend several parts of themselves.
        numpy = sys.modules.get("numpy")
        if numpy is not None and isinstance(owner, numpy.ndarray):
            key = id(owner)
            forget = self._known.pop
            self._known[key] = (weakref.ref(owner, lambda _: forget(key, None)), view.nbytes, ref.digest)
        return ref
