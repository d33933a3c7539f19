"""Large buffers, once per node: kept as files in shared memory where caller and workers share a host."""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import math
import os
import tempfile
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from skyward.errors import PoolError
from skyward.transfer.arrays import Memory
from skyward.transfer.pickling import Buffer
from skyward.transfer.wire import BlobRef

logger = logging.getLogger(__name__)

_KEEP_BYTES = 256 << 20
_LINGER_S = 30.0
"""Seconds for which the buffers of the last call stay even when they are larger. Chosen, not measured."""
_WRITE_BYTES = 256 << 20
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


class Store:
    """Keeps each distinct buffer once, by content.

    With `folders` that workers can read, a buffer becomes a file that they map: in the first folder that has room for
    it. Without, it is kept here until the engine has put it on the cluster. Safe to use from several threads.

    Of buffers that no unfinished call needs, those released last stay: `keep_bytes` of them, and all that the last call
    has released until `drop_idle`. `on_idle` is called, in any thread, when the others were dropped, and when there is
    something for `drop_idle`.
    """

    def __init__(self, *folders: Path, keep_bytes: int = _KEEP_BYTES) -> None:
        self._folders = folders
        self._lock = threading.Lock()
        self._refs: dict[str, BlobRef] = {}
        self._uses: dict[str, int] = {}
        self._idle: OrderedDict[str, float] = OrderedDict()  # those without uses, and since when
        self._idle_bytes = 0
        self._data: dict[str, bytes] = {}
        self._keep_bytes = keep_bytes
        self._has_warned = False
        self._dropped: set[str] = set()
        self.on_idle: Callable[[], None] = lambda: None
        self.writes: int = 0  # buffers hashed to something new and stored
        self.written_bytes: int = 0

    @property
    def has_files(self) -> bool:
        """Whether workers read the files of this machine."""
        return bool(self._folders)

    def put(self, buffer: memoryview | Memory, *, digest: str | None = None) -> BlobRef:
        """Store `buffer` unless it is known, and count one use of it; `release` ends the use.

        `digest`, 32 hexadecimal digits, names a buffer whose content changes.

        Raises
        ------
        PoolError
            There is no room for it in any of the folders.
        """
        if isinstance(buffer, Memory):
            if self._folders and not buffer.is_contiguous:
                return self._put_copy(buffer, digest)
            buffer = buffer.raw()
        view = buffer.cast("B")
        digest = digest or xxhash.xxh3_128_hexdigest(view)
        with self._lock:
            if digest in self._refs:
                return self._use(digest)
        if not self._folders:
            data = view.obj if type(view.obj) is bytes and len(view.obj) == view.nbytes else bytes(view)
            return self._add(digest, view.nbytes, None, data)
        pieces = [view[start : start + _WRITE_BYTES] for start in range(0, view.nbytes, _WRITE_BYTES)]
        return self._add(digest, view.nbytes, self._write(lambda: pieces, view.nbytes))

    def _put_copy(self, memory: Memory, digest: str | None) -> BlobRef:
        """Store an array that is not contiguous, without a copy of it but the file."""
        hasher = xxhash.xxh3_128()

        def pieces() -> Iterable[memoryview]:
            hasher.reset()
            for piece in memory.pieces():
                hasher.update(piece)
                yield piece

        file = self._write(pieces, memory.nbytes)
        return self._add(digest or hasher.hexdigest(), memory.nbytes, file)

    def _add(self, digest: str, nbytes: int, file: Path | None, data: bytes = b"") -> BlobRef:
        with self._lock:
            if digest in self._refs:  # known before it was written, or written by another thread meanwhile
                if file is not None:
                    file.unlink()
            else:
                path = None
                if file is None:
                    self._data[digest] = data
                else:
                    path = str(file.rename(file.with_name(digest)))
                self._refs[digest] = BlobRef(digest, nbytes, path)
                self.writes += 1
                self.written_bytes += nbytes
            return self._use(digest)

    def reuse(self, refs: Sequence[BlobRef]) -> bool:
        """Count one more use of each buffer if all are still stored; otherwise change nothing and return False."""
        with self._lock:
            if any(ref.digest not in self._refs for ref in refs):
                return False
            for ref in refs:
                self._use(ref.digest)
            return True

    def _use(self, digest: str) -> BlobRef:
        self._uses[digest] = self._uses.get(digest, 0) + 1
        ref = self._refs[digest]
        if self._idle.pop(digest, None) is not None:
            self._idle_bytes -= ref.nbytes
        return ref

    def release(self, refs: Sequence[BlobRef]) -> None:
        if not refs:
            return
        with self._lock:
            for ref in refs:
                if ref.digest not in self._refs:  # the store is closed
                    continue
                self._uses[ref.digest] -= 1
                if not self._uses[ref.digest]:
                    self._idle[ref.digest] = time.monotonic()
                    self._idle_bytes += ref.nbytes
            latest = {ref.digest for ref in refs}
            self._drop_idle(lambda digest: digest not in latest)
            is_over = self._idle_bytes > self._keep_bytes
        if is_over or self._dropped:
            self.on_idle()

    def drop_idle(self) -> float | None:
        """Drop what has been idle for `_LINGER_S` beyond `keep_bytes`; return the seconds until there is more of it."""
        now = time.monotonic()
        with self._lock:
            self._drop_idle(lambda digest: now - self._idle[digest] >= _LINGER_S)
            if self._idle_bytes <= self._keep_bytes:
                return None
            return max(0.0, next(iter(self._idle.values())) + _LINGER_S - now)

    def _drop_idle(self, may_go: Callable[[str], bool], keep_bytes: int | None = None) -> None:
        keep = self._keep_bytes if keep_bytes is None else keep_bytes
        for digest in list(self._idle):
            if self._idle_bytes <= keep:
                return
            if may_go(digest):
                self._drop(digest)

    def take_dropped(self) -> set[str]:
        """Return the digests that were dropped since the last time: their copies on the cluster may go."""
        with self._lock:
            dropped, self._dropped = self._dropped - self._refs.keys(), set()
            return dropped

    def data(self, digest: str) -> bytes:
        return self._data[digest]

    def close(self) -> None:
        """Remove every file. Workers that have mapped one keep what they mapped."""
        with self._lock:
            for digest in list(self._refs):
                self._drop(digest)

    def _drop(self, digest: str) -> None:
        ref = self._refs.pop(digest)
        if self._idle.pop(digest, None) is not None:
            self._idle_bytes -= ref.nbytes
        self._uses.pop(digest, None)
        self._data.pop(digest, None)
        self._dropped.add(digest)
        if ref.path is not None:
            with contextlib.suppress(FileNotFoundError):
                Path(ref.path).unlink()

    def _write(self, pieces: Callable[[], Iterable[memoryview]], nbytes: int) -> Path:
        """Return a new file with these pieces. A worker never maps half a file: it has its name later."""
        full = OSError()
        for folder in self._folders:
            for _ in range(2):  # the second time without what no call needs
                try:
                    return _write_file(folder, pieces())
                except OSError as exc:
                    if exc.errno not in _NO_ROOM:
                        raise
                    full = exc
                with self._lock:
                    self._drop_idle(lambda _: True, keep_bytes=0)
            if folder is not self._folders[-1] and not self._has_warned:
                self._has_warned = True
                logger.warning(
                    "%s has no room for an argument of %.0f MB: large arguments that do not fit there are kept in %s, "
                    "on disk. In Docker, raise --shm-size",
                    folder.parent,
                    nbytes / 1e6,
                    self._folders[-1].parent,
                )
        places = " or ".join(str(folder.parent) for folder in self._folders)
        raise PoolError(
            f"an argument of {nbytes / 1e6:.0f} MB can't be kept in {places}: {full.strerror}. "
            "Free some space, or set TMPDIR to a folder that has room, and enter the pool again"
        ) from full


def _write_file(folder: Path, pieces: Iterable[memoryview]) -> Path:
    fd, name = tempfile.mkstemp(dir=folder)
    try:
        with os.fdopen(fd, "wb", buffering=0) as file:
            for piece in pieces:
                done = 0
                while done < piece.nbytes:
                    done += file.write(piece[done:])
        return Path(name)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


_WHOLE_BYTES = 4 << 20
"""A buffer up to this size is compared as a whole, a larger one by samples."""
_PAGE_BYTES = 4096
_MOST_PARTS = 1024
"""Views of one array that are known at once: of a window that slides over it, each is another."""
_MOST_SAMPLES, _SAMPLE_BYTES = 4096, 64
"""Samples of 64 bytes, one cache line, at most one for each page. Fetching the lines is what a look costs: 20 ns each
when they are not in a cache, so 0.03 ms for 5 MB and 0.1 ms for 200 MB, where hashing takes 0.2 and 12 (2026-11-28)."""


class SeenBuffers:
    """Recognises an array that one group has sent before, or another view of it, so that it is not hashed again.

    With `unchanged`, the caller can't change an array between two calls, and a known array is not looked at. Otherwise
    an array of up to 4 MiB is hashed each time. A larger one is hashed again when its samples differ: its first and
    last page, and a sample in each page, or 4096 spread over all of it where it has more pages. They hit every changed
    region of 8 KiB, or of 1/2048 of the array if that is larger.
    """

    def __init__(self, store: Store, *, unchanged: bool) -> None:
        self._store = store
        self._unchanged = unchanged
        self._known: dict[int, _Parts] = {}  # by the id of the array that holds the memory
        self._latest: tuple[Any, BlobRef] | None = None  # bytes: they can't change, but take no weak reference

    def put(self, buffer: Buffer) -> BlobRef:
        if not isinstance(buffer, Memory):
            return self._put_other(buffer.raw())
        if not (self._unchanged or buffer.nbytes > _WHOLE_BYTES):
            return self._store.put(buffer)
        samples = 0 if self._unchanged else _samples(buffer)
        owner, place = buffer.owner, buffer.place
        key = id(owner)
        known = self._known.get(key)
        if known is None or known.owner() is not owner:
            forget = self._known.pop
            known = self._known[key] = _Parts(weakref.ref(owner, lambda _: forget(key, None)), {})
        ref, sampled = known.refs.get(place, (None, 0))
        if ref is not None and sampled == samples and self._store.reuse((ref,)):
            return ref
        ref = self._store.put(buffer)
        if len(known.refs) >= _MOST_PARTS:
            known.refs.clear()
        known.refs[place] = ref, samples
        return ref

    def _put_other(self, view: memoryview) -> BlobRef:
        if type(view.obj) is not bytes:  # who knows what else of its memory it lends
            return self._store.put(view)
        if self._latest is not None and self._latest[0] is view.obj and self._store.reuse((self._latest[1],)):
            return self._latest[1]
        ref = self._store.put(view)
        self._latest = view.obj, ref
        return ref


class _Parts(NamedTuple):
    """The parts of one array's memory that were sent, each with what its samples were."""

    owner: weakref.ref[Any]
    refs: dict[tuple[Any, ...], tuple[BlobRef, int]]


def _samples(memory: Memory) -> int:
    """Return a hash of samples of a large array."""
    import numpy as np

    if not memory.is_contiguous:
        array = memory.array
        run = max(1, _SAMPLE_BYTES // array.itemsize)
        return xxhash.xxh3_64_intdigest(array[_elements(array.shape, array.itemsize, run)].tobytes())
    view = memory.raw()
    lines = np.frombuffer(view, f"V{_SAMPLE_BYTES}", view.nbytes // _SAMPLE_BYTES)
    hasher = xxhash.xxh3_64(lines.take(_positions(len(lines), view.nbytes // _PAGE_BYTES)))
    hasher.update(view[:_PAGE_BYTES])
    hasher.update(view[-_PAGE_BYTES:])
    return hasher.intdigest()


@functools.lru_cache(maxsize=16)
def _elements(shape: tuple[int, ...], itemsize: int, run: int) -> Any:
    """Return the indices of the elements that are samples of an array: runs of them instead of lines."""
    import numpy as np

    count = math.prod(shape)
    page = min(count, max(1, _PAGE_BYTES // itemsize))
    starts = _positions(count // run, count * itemsize // _PAGE_BYTES) * run
    within = (starts[:, None] + np.arange(run)).ravel()
    return np.unravel_index(np.concatenate([np.arange(page), within, np.arange(count - page, count)]), shape)


@functools.lru_cache(maxsize=64)
def _positions(count: int, pages: int) -> Any:
    """Return which of `count` lines are samples: one in each equal part.

    Their place within the part follows multiples of the golden ratio: at equal distances, all samples of a matrix
    could lie in the same few columns. Two neighbours are less than two parts apart.
    """
    import numpy as np

    parts = min(_MOST_SAMPLES, pages, count)
    part = np.arange(parts, dtype=np.int64)
    within = part * 2654435761 % (1 << 32) * (count // parts) >> 32  # 2654435761 / 2**32 is the golden ratio - 1
    return part * count // parts + within
