"""Functions and arguments of chunks, unpickled with their large buffers; functions are kept for the next chunks."""

from __future__ import annotations

import mmap
import os
import weakref
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from skyward.transfer import functions, pickling, sources
from skyward.transfer.wire import Access, BlobRef, Chunk, FunctionRef
from skyward.worker import buffer_files, interrupts

_functions: OrderedDict[tuple[str, Access | None], Any] = OrderedDict()
"""Functions that calls may share; None for one that each call unpickles: calls could change it, or it is large."""
_facts = b""  # with which the functions were unpickled
_FUNCTIONS_KEPT = 128  # chosen, not measured: a run seldom has more than a few
_maps: weakref.WeakValueDictionary[str, mmap.mmap] = weakref.WeakValueDictionary()


class Unpickler:
    """Unpickles functions and arguments of one chunk, with their large buffers."""

    def __init__(self, chunk: Chunk, blobs: tuple[Any, ...]) -> None:
        self._access = chunk.access
        self._chunk = chunk
        self._blobs: Mapping[str, Any] = dict(zip(chunk.not_in_files(), blobs, strict=True)) if blobs else {}

    def install_sources(self, folder: str) -> bool:
        """Make the caller's own modules importable; return False if this process has to end for that."""
        global _facts
        facts = self._chunk.facts
        if not sources.install(facts, self._buffer, folder, may_restart=interrupts.may_restart):
            return False
        if facts != _facts:
            _facts = facts
            _functions.clear()  # of modules that may have been imported again
        return True

    def load(self, data: bytes, refs: tuple[BlobRef, ...]) -> Any:
        return pickling.loads(data, [self._buffer(r) for r in refs]) if refs else pickling.loads(data)

    def function(self, ref: FunctionRef) -> Any:
        key = (ref.digest, self._access if ref.buffers else None)
        fn = _functions.get(key)
        if fn is None:
            fn = self.load(ref.data, ref.buffers)
            if key not in _functions:
                _functions[key] = fn if not ref.buffers and functions.is_constant(fn) else None
                while len(_functions) > _FUNCTIONS_KEPT:
                    _functions.popitem(last=False)
        return fn

    def _buffer(self, ref: BlobRef) -> Any:
        access = self._access
        mode = "r" if access is None else access.mode if ref.nbytes > access.over else "c"
        if ref.digest in self._blobs:
            blob = self._blobs[ref.digest]
            return bytearray(blob) if mode == "c" else memoryview(blob).toreadonly()
        path = ref.path or str(buffer_files.path_of(ref.digest))
        if mode == "c":
            return _map(path, ref.nbytes, mmap.ACCESS_COPY)
        found = _maps.get(path)
        if found is None:
            found = _maps[path] = _map(path, ref.nbytes, mmap.ACCESS_READ if mode == "r" else mmap.ACCESS_WRITE)
        return found


def _map(path: str, nbytes: int, access: int) -> mmap.mmap:
    fd = os.open(path, os.O_RDWR if access == mmap.ACCESS_WRITE else os.O_RDONLY)
    try:
        return mmap.mmap(fd, nbytes, access=access)
    finally:
        os.close(fd)
