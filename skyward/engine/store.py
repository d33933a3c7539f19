"""Large buffers, once per node: kept as files in shared memory where caller and workers share a host."""

from __future__ import annotations

import contextlib
import functools
import os
import pickle
import sys
import tempfile
import threading
import weakref
from collections import OrderedDict
from collections.abc import Sequence
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
        self.written_bytes = 0

    def put(self, buffer: pickle.PickleBuffer | memoryview, *, digest: str | None = None) -> BlobRef:
        """Store `buffer` unless it is known, and count one use of it; `release` ends the use.

        `digest`, 32 hexadecimal digits, names a buffer whose content changes.
        """
        view = buffer.raw() if isinstance(buffer, pickle.PickleBuffer) else buffer
        digest = digest or xxhash.xxh3_128_hexdigest(view)
        with self._lock:
            if digest not in self._sizes:
                self._write(digest, view)
                self._sizes[digest] = view.nbytes
                self._total += view.nbytes
                self.writes += 1
                self.written_bytes += view.nbytes
            return self._use(digest)

    def reuse(self, refs: Sequence[BlobRef]) -> bool:
        """Count one more use of each buffer if all are still stored; otherwise change nothing and return False."""
        with self._lock:
            if any(ref.digest not in self._sizes for ref in refs):
                return False
            for ref in refs:
                self._use(ref.digest)
            return True

    def _use(self, digest: str) -> BlobRef:
        self._uses[digest] = self._uses.get(digest, 0) + 1
        self._sizes.move_to_end(digest)
        path = str(self.folder / digest) if self.folder else None
        return BlobRef(digest, self._sizes[digest], path)

    def release(self, refs: Sequence[BlobRef]) -> None:
        with self._lock:
            for ref in refs:
                if ref.digest in self._uses:  # not after `close`
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


_WHOLE_BYTES = 4 << 20
"""A buffer up to this size is compared as a whole, a larger one by samples."""
_PAGE_BYTES = 4096
_MOST_SAMPLES, _SAMPLE_BYTES = 4096, 64
"""Samples of 64 bytes, one cache line, at most one for each page. Fetching the lines is what a look costs: 20 ns each
when they are not in a cache, so 0.03 ms for 5 MB and 0.1 ms for 200 MB, where hashing takes 0.2 and 12 (2026-11-28)."""


class Keeper:
    """Recognises the buffer of an array that one group has sent before, so that its content is not hashed again.

    With `unchanged`, the caller can't change an array between two calls, and a known array is not looked at. Otherwise
    an array of up to 4 MiB is hashed each time. A larger one is hashed again when its samples differ: its first and
    last page, and a sample in each page, or 4096 spread over all of it where it has more pages. They hit every changed
    region of 8 KiB, or of 1/2048 of the array if that is larger.
    """

    def __init__(self, store: Store, *, unchanged: bool) -> None:
        self._store = store
        self._unchanged = unchanged
        self._known: dict[int, tuple[weakref.ref[Any], BlobRef, int]] = {}  # by the array's id

    def put(self, buffer: pickle.PickleBuffer) -> BlobRef:
        view = buffer.raw()
        owner = view.obj
        # Only a numpy array is its buffer and nothing else: other owners may lend several parts of themselves.
        numpy = sys.modules.get("numpy")
        is_array = numpy is not None and isinstance(owner, numpy.ndarray)
        if not is_array or not (self._unchanged or view.nbytes > _WHOLE_BYTES):
            return self._store.put(view)
        key = id(owner)
        samples = 0 if self._unchanged else _samples(view)
        array, ref, sampled = self._known.get(key, (None, None, 0))
        if array is not None and ref is not None and array() is owner:
            is_same = ref.nbytes == view.nbytes and sampled == samples
            if is_same and self._store.reuse((ref,)):
                return ref
        ref = self._store.put(view)
        forget = self._known.pop
        self._known[key] = (weakref.ref(owner, lambda _: forget(key, None)), ref, samples)
        return ref


def _samples(view: memoryview) -> int:
    """Return a hash of samples of a large array's buffer."""
    import numpy as np

    count = view.nbytes // _SAMPLE_BYTES
    lines = np.frombuffer(view, f"V{_SAMPLE_BYTES}", count)
    hasher = xxhash.xxh3_64(lines.take(_positions(count)))
    hasher.update(view[:_PAGE_BYTES])
    hasher.update(view[-_PAGE_BYTES:])
    return hasher.intdigest()


@functools.lru_cache(maxsize=64)
def _positions(count: int) -> Any:
    """Return which of `count` lines are samples: one in each equal part.

    Their place within the part follows multiples of the golden ratio: at equal distances, all samples of a matrix
    could lie in the same few columns. Two neighbours are less than two parts apart.
    """
    import numpy as np

    parts = min(_MOST_SAMPLES, count * _SAMPLE_BYTES // _PAGE_BYTES)
    part = np.arange(parts, dtype=np.int64)
    within = part * 2654435761 % (1 << 32) * (count // parts) >> 32  # 2654435761 / 2**32 is the golden ratio - 1
    return part * count // parts + within
