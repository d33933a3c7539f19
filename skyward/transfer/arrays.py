"""How numpy arrays leave a pickle: as memory beside it, or as the file that they map, and how they are made again.

numpy's own pickling copies into the pickle what is not contiguous, and what Python's buffers have no type for, such as
dates. Knows numpy alone, and imports it only where an array has to be made.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Array = Any  # numpy's, which is imported only where it is used

_PIECE_BYTES = 1 << 20


class Memory:
    """The elements of a numpy array, beside the pickle that it was left out of.

    Attributes
    ----------
    array
        The array with its axes in the order of their strides, largest first.
    """

    __slots__ = ("array",)

    def __init__(self, array: Array) -> None:
        self.array: Array = array

    @property
    def nbytes(self) -> int:
        return int(self.array.nbytes)

    @property
    def owner(self) -> Array:
        """The array that holds the memory: views come and go."""
        import numpy as np

        owner = self.array
        while isinstance(owner.base, np.ndarray):
            owner = owner.base
        return owner

    @property
    def place(self) -> tuple[Any, ...]:
        """Which part of the owner's memory it is, and how that is read."""
        array = self.array
        return array.__array_interface__["data"][0], array.shape, array.strides, array.dtype

    @property
    def is_contiguous(self) -> bool:
        return bool(self.array.flags.c_contiguous)

    def raw(self) -> memoryview:
        """Return the bytes: the array's own if it is contiguous, otherwise a copy."""
        import numpy as np

        if self.is_contiguous:
            return memoryview(self.array.reshape(-1).view(np.uint8))
        return memoryview(self.array.tobytes())

    def pieces(self) -> Iterator[memoryview]:
        """Yield the bytes piece by piece, without a copy of the whole. Each piece is valid until the next one."""
        import numpy as np

        flags = ["external_loop", "buffered", "zerosize_ok"]
        size = max(1, _PIECE_BYTES // self.array.itemsize)
        iterator: Any = np.nditer  # whose types know no "contig"
        for piece in iterator(self.array, flags, ["readonly", "contig"], buffersize=size, order="C"):
            yield memoryview(piece.view(np.uint8))


def is_plain(obj: Any) -> bool:
    """Tell whether `obj` is an array that its elements make up: not of a subclass, and without Python objects."""
    import numpy as np

    return type(obj) is np.ndarray and not obj.dtype.hasobject


def leave_out(array: Array) -> tuple[Memory, tuple[Any, ...]]:
    """Return an array's memory, and what `restore` needs beside that."""
    axes = sorted(range(array.ndim), key=lambda axis: -abs(array.strides[axis]))
    ordered = array.transpose(axes)
    back = sorted(range(array.ndim), key=axes.__getitem__)
    return Memory(ordered), (array.dtype, ordered.shape, None if axes == sorted(axes) else back)


def restore(
    buffer: Any, dtype: Any, shape: tuple[int, ...], axes: list[int] | None, is_writable: bool | None = None
) -> Array:
    """Return an array on `buffer`: read-only or a writable copy; None: as the buffer is."""
    import numpy as np

    array = np.frombuffer(buffer, dtype).reshape(shape)
    if is_writable:
        array = array.copy()
    elif is_writable is not None:
        array.flags.writeable = False
    return array if axes is None else array.transpose(axes)


def mapped(obj: Any) -> Any:
    """Return the `numpy.memmap` that an array or a memory map is a part of; None if it is not in a mapped file."""
    import numpy as np

    if type(obj) not in (np.ndarray, np.memmap) or not obj.size:
        return None
    while obj is not None:
        base = getattr(obj, "base", None)
        if isinstance(obj, np.memmap) and isinstance(base, mmap.mmap):
            return obj
        obj = base
    return None


def locate(array: Array, source: Array) -> tuple[Any, ...] | None:
    """Return what `open_file` needs to map the part `array` of the memory map `source` again.

    None if the file is not there any more, or another one has its name.
    """
    import numpy as np

    byte_bounds: Any = getattr(np, "byte_bounds", None) or np.lib.array_utils.byte_bounds  # before and since numpy 2
    try:
        found = Path(source.filename).stat()
    except (OSError, TypeError):  # it was removed, or never had a name
        return None
    if source.base.size() != found.st_size:
        return None
    low, high = byte_bounds(array)
    offset = source.offset + low - byte_bounds(source)[0]
    first = array.__array_interface__["data"][0] - low
    mode = source.mode if source.mode != "w+" else "r+"  # "w+" would empty the file
    if not array.flags.writeable:
        mode = "r"
    layout = (array.dtype, array.shape, array.strides)
    return os.fspath(source.filename), (found.st_dev, found.st_ino), mode, offset, high - low, first, *layout


def open_file(
    path: str,
    identity: tuple[int, int],
    mode: Any,
    offset: int,
    nbytes: int,
    first: int,
    dtype: Any,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
) -> Array:
    """Map a part of a file in `mode`, one of `numpy.memmap`. `first` is where in the part the first element is.

    Raises
    ------
    OSError
        The file is not there, or is another one than the caller has mapped.
    """
    import numpy as np

    found = Path(path).stat()
    if (found.st_dev, found.st_ino) != identity:
        raise OSError(errno.ESTALE, "the file of a numpy.memmap is another one where the call runs", path)
    memory: Any = np.memmap(path, np.uint8, mode, offset, nbytes)
    array: Any = np.ndarray(shape, dtype, memory, first, strides).view(np.memmap)
    array._mmap, array.filename, array.offset, array.mode = memory._mmap, memory.filename, offset + first, memory.mode
    return array
