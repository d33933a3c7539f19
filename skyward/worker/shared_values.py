"""Large values that calls pass on within a node: one copy in shared memory, which all its workers map.

Dask copies a value from process to process. Between two workers of a node, ours send names of files instead, one for
each large buffer of the value. Each process has its own link to a file; the memory is free when the last one is gone.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import socket
import threading
import uuid
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from skyward.transfer.pickling import OUT_OF_BAND
from skyward.worker import buffer_files

logger = logging.getLogger(__name__)

_NODE = "skyward_node"
_HOLD_S = 60.0
"""Seconds for which a file that was named to another worker stays: it has a link then. Chosen, not measured."""
_lock = threading.Lock()
_paths: dict[tuple[int, int], str] = {}  # files that this process has mapped, by address and size
_sent: dict[int, tuple[weakref.ref[Any], Any]] = {}  # what was sent of values whose memory is not in files, by their id


def install(worker: Any) -> None:
    """Let `worker`, a Dask worker in this process, share values with the others of its node."""
    from distributed.protocol.serialize import dask_dumps, dask_loads, register_serialization_family

    folder = os.environ.get(buffer_files.VARIABLE)
    if folder is None:
        return
    node = f"{socket.gethostname()}:{folder}"
    worker.connection_args["handshake_overrides"] = {_NODE: node}

    def dumps(x: Any, context: Any = None) -> Any:
        if context is not None and context.get("recipient", {}).get(_NODE) == node:
            try:
                if (shared := _share(worker, x, Path(folder))) is not None:
                    return shared
            except OSError as exc:
                logger.debug("a value is copied to another worker of the node: %s", exc)
        return dask_dumps(x, context)

    def loads(header: Any, frames: Any) -> Any:
        if _NODE not in header:
            return dask_loads(header, frames)
        return _load(frames, header[_NODE])

    register_serialization_family("dask", dumps, loads)


def _share(worker: Any, x: Any, folder: Path) -> tuple[dict[str, Any], list[Any]] | None:
    """Return what is sent of a value whose large buffers are in files now; None if it has none."""
    from dask.sizeof import sizeof
    from distributed.protocol import pickle

    if sizeof(x) < OUT_OF_BAND:
        return None
    with _lock:
        known = _sent.get(id(x))
        if known is not None and known[0]() is x:
            return known[1][0]  # type: ignore[no-any-return]
        buffers: list[Any] = []
        data = pickle.dumps(x, buffer_callback=lambda buffer: buffers.append(buffer.raw()))
        if all(buffer.nbytes < OUT_OF_BAND for buffer in buffers):
            return None
        files: list[Any] = []
        maps: list[Any] = []
        for buffer in buffers:
            path = _paths.get(_place(buffer))
            if path is None and buffer.nbytes >= OUT_OF_BAND:
                path = str(_write(folder, buffer))
                maps.append(_map(path, buffer.nbytes))
            files.append(None if path is None else (path, buffer.nbytes))
        small = [buffer for buffer, file in zip(buffers, files, strict=True) if file is None]
        found = {_NODE: files}, [data, *small]
        if maps:
            with contextlib.suppress(TypeError):  # it takes no weak reference
                key = id(x)
                _sent[key] = weakref.ref(x, lambda _: _sent.pop(key, None)), (found, maps)
            worker.loop.add_callback(_replace, worker, x, found)
        # What is dropped here meanwhile is still there for the one that is told of it.
        worker.loop.add_callback(worker.loop.call_later, _HOLD_S, len, [x, *maps])
        return found


def _replace(worker: Any, x: Any, found: tuple[dict[str, Any], list[Any]]) -> None:
    """Let this process use the files too, so that the node has the value once."""
    header, frames = found
    for key, value in list(worker.data.items()):
        if value is x:
            worker.data[key] = _load(frames, header[_NODE])


def _load(frames: Sequence[Any], files: Sequence[Any]) -> Any:
    from distributed.protocol import pickle

    data, *small = frames
    rest = iter(small)
    buffers = [next(rest) if file is None else _open(*file) for file in files]
    return pickle.loads(data, buffers=buffers)


def _open(path: str, nbytes: int) -> mmap.mmap:
    """Map a file of another process by a link of our own, or one of our own."""
    link = str(Path(path).with_name(f"value-{uuid.uuid4().hex}"))
    os.link(path, link)
    return _map(link, nbytes)


def _map(path: str, nbytes: int) -> mmap.mmap:
    """Map a file, which is removed when nothing in this process uses the memory any more."""
    fd = os.open(path, os.O_RDONLY)
    try:
        mapped = mmap.mmap(fd, nbytes, access=mmap.ACCESS_READ)
    finally:
        os.close(fd)
    place = _place(memoryview(mapped))
    _paths[place] = path
    weakref.finalize(mapped, _forget, place, path).atexit = False
    return mapped


def _forget(place: tuple[int, int], path: str) -> None:
    if _paths.get(place) == path:
        del _paths[place]
    Path(path).unlink(missing_ok=True)


def _place(buffer: memoryview) -> tuple[int, int]:
    import numpy as np

    return np.frombuffer(buffer, np.uint8).ctypes.data, buffer.nbytes


def _write(folder: Path, buffer: memoryview) -> Path:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = folder / f"value-{uuid.uuid4().hex}"
    try:
        with path.open("xb", buffering=0) as file:
            done = 0
            while done < buffer.nbytes:
                done += file.write(buffer[done:])
    except OSError:
        path.unlink(missing_ok=True)
        raise
    return path
