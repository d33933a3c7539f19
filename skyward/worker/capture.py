"""What a process and its programs print: file descriptors 1 and 2 lead into pipes, which are read as lines.

Everything that ends up on the descriptors is read: prints, C code, programs, forked children, `faulthandler`. What is
not read yet stays in the pipes, which outlive the process: the agent has them open too, and reads the last lines of a
worker that died. Imports nothing of skyward.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import io
import logging
import os
import re
import select
import struct
import sys
import termios
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

VARIABLE = "SKYWARD_OUTPUT"
"""Names, for a worker of our own, the two pipes of its slot: they are at this path with ``.1`` and ``.2``."""
HALF_FULL = 32 << 10
"""Bytes at which a pipe had better be read before it is full: Linux gives it 64 KiB, macOS up to as many."""
_LONGEST = 10_000
"""Bytes of a line; what is beyond is cut off. Chosen, not measured: many screens wide."""
_BEGIN, _END = b"\0\x0e\0", b"\0\x0f\0"
_MARKED = re.compile(re.escape(_BEGIN) + rb"(.*?)" + re.escape(_END), re.DOTALL)

Line = tuple[str, str]
"""``"stdout"`` or ``"stderr"``, and the text without its end. Or `DROPPED`, and how many lines stood in its place."""
DROPPED = "dropped"


@contextlib.contextmanager
def pipes(path: str) -> Iterator[Reader]:
    """Have the pipes of a slot at `path` inside the block, and a reader that keeps them open."""
    for name in _names(path):
        os.mkfifo(name, 0o600)
    reader = Reader(path)
    try:
        yield reader
    finally:
        reader.close()
        for name in _names(path):
            Path(name).unlink(missing_ok=True)


def take_over(path: str | None) -> Reader:
    """Let descriptors 1 and 2 lead into the pipes at `path`, and return their reader. None: into new pipes.

    Logging handlers that exist already, Dask's, go on writing where standard error has led until now.
    """
    if path is None:
        pairs = [os.pipe(), os.pipe()]
        reader, ends = Reader(pairs[0][0], pairs[1][0]), [pair[1] for pair in pairs]
    else:
        reader = Reader(path)
        ends = [os.open(name, os.O_WRONLY) for name in _names(path)]
    _keep_handlers()
    for descriptor, end in enumerate(ends, 1):
        os.dup2(end, descriptor)
        os.close(end)
    _buffer_lines_of_c()
    write_lines(marked=True)
    return reader


def write_lines(*, marked: bool) -> None:
    """Make `sys.stdout` and `sys.stderr` write each line to descriptors 1 and 2 at once, and show all warnings.

    `marked`: both are pipes that a `Reader` reads, so that lines of both keep their order.
    """
    # Every warning: it goes to the caller, whose own filters then decide what is shown.
    warnings.simplefilter("always")
    errors = _Marked() if marked else io.FileIO(2, "w", closefd=False)
    sys.stdout = _text(io.FileIO(1, "w", closefd=False), "<stdout>")
    sys.stderr = _text(errors, "<stderr>")
    vars(sys).update(__stdout__=sys.stdout, __stderr__=sys.stderr)
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))


def flush() -> None:
    """Write what Python's streams hold back."""
    streams: dict[int, Any] = {id(s): s for s in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__)}
    for stream in streams.values():
        with contextlib.suppress(Exception):  # a call may have put anything in their place, or closed them
            stream.flush()


def _names(path: str) -> tuple[str, str]:
    return f"{path}.1", f"{path}.2"


def _text(raw: io.FileIO, name: str) -> io.TextIOWrapper:
    vars(raw)["name"] = name  # as Python's own streams have it
    return io.TextIOWrapper(io.BufferedWriter(raw), "utf-8", "backslashreplace", line_buffering=True)


def _keep_handlers() -> None:
    flush()
    log = os.fdopen(os.dup(2), "w", buffering=1, errors="backslashreplace")
    ours = (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__)
    for logger in (logging.root, *logging.root.manager.loggerDict.values()):
        for handler in getattr(logger, "handlers", ()):
            if isinstance(handler, logging.StreamHandler) and handler.stream in ours:
                handler.setStream(log)


def _buffer_lines_of_c() -> None:
    """Have C's `printf` write each line at once, as to a terminal: to a pipe it would write when 4 KiB are full."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # another name elsewhere, or no such library
        library = ctypes.CDLL(None)
        stdout = ctypes.c_void_p.in_dll(library, "__stdoutp" if sys.platform == "darwin" else "stdout")
        library.setvbuf(stdout, None, 1, 0)  # _IOLBF of stdio.h: 1 in glibc, musl and macOS


class _Marked(io.FileIO):
    """Standard error of Python: goes into the pipe of standard output, with marks, to be in order with prints.

    What a mark encloses is written in one piece. To descriptor 2 where a call has turned that elsewhere.
    """

    _PIECE = select.PIPE_BUF - len(_BEGIN) - len(_END)  # POSIX: written without anything in between

    def __init__(self) -> None:
        super().__init__(2, "w", closefd=False)
        self._pipe = os.dup(1)
        self._place = self._where()

    def _where(self) -> tuple[int, int]:
        found = os.fstat(2)
        return found.st_dev, found.st_ino

    def write(self, data: Any) -> int:
        if self._where() != self._place:
            return super().write(data) or 0
        view = memoryview(data).cast("B")
        for start in range(0, len(view), self._PIECE):
            os.write(self._pipe, b"".join((_BEGIN, view[start : start + self._PIECE], _END)))
        return len(view)


class Reader:
    """Reads pipes as lines, without waiting. A line that has only begun waits for its end, until `rest` is called.

    Not thread-safe.
    """

    def __init__(self, *pipes: Any) -> None:
        if isinstance(pipes[0], str):
            pipes = tuple(os.open(name, os.O_RDONLY | os.O_NONBLOCK) for name in _names(pipes[0]))
        self.descriptors: tuple[int, ...] = pipes
        # Three writers whose lines are kept apart: prints, Python's standard error, and that of everything else.
        self._begun: dict[tuple[int, bool], bytes] = {}

    def size(self) -> int:
        """Return how many bytes are in the fuller pipe."""
        return max(_size(fd) for fd in self.descriptors)

    @property
    def has_begun(self) -> bool:
        """Whether a line has begun that has not ended."""
        return bool(self._begun)

    def read(self) -> Iterator[Line]:
        """Yield the lines that are in the pipes now."""
        for number, fd in enumerate(self.descriptors):
            # What comes meanwhile is for the next time: a storm would keep us here.
            if size := _size(fd):
                for turn, piece in enumerate(_MARKED.split(os.read(fd, size))):
                    if piece:
                        yield from self._split((number, turn % 2 == 1), piece)

    def rest(self) -> Iterator[Line]:
        """Yield lines that have only begun."""
        begun, self._begun = self._begun, {}
        for writer, piece in begun.items():
            yield _line(writer, piece)

    def _split(self, writer: tuple[int, bool], piece: bytes) -> Iterator[Line]:
        *lines, begun = (self._begun.pop(writer, b"") + piece).split(b"\n")
        for line in lines:
            yield _line(writer, line)
        if begun:
            # Of a bar that begins its line again and again only the last state counts; a line is not kept for ever.
            begun = begun[max(0, begun.rfind(b"\r", 0, -1)) :]
            self._begun[writer] = begun[: 2 * _LONGEST]

    def close(self) -> None:
        descriptors, self.descriptors = self.descriptors, ()
        for fd in descriptors:
            os.close(fd)


def _line(writer: tuple[int, bool], text: bytes) -> Line:
    text = text.rstrip(b"\r")
    text = text[text.rfind(b"\r") + 1 :]
    cut = f" ... cut after {_LONGEST} bytes" if len(text) > _LONGEST else ""
    return "stderr" if any(writer) else "stdout", text[:_LONGEST].decode(errors="replace") + cut


def _size(fd: int) -> int:
    size: int = struct.unpack("i", fcntl.ioctl(fd, termios.FIONREAD, b"\0\0\0\0"))[0]
    return size
