"""How numpy arrays leave a pickle: as memory beside it, or as the file that they map, and how they are made again.

numpy's own pickling copies into the pickle what is not contiguous, and what Python's buffers have no type for, such as
dates. Knows numpy alone, and imports it only where an array has to be made.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Array = Any  # numpy's, which is not imported where nobody uses it

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
        self.array = array

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


def restore(buffer: Any, dtype: Any, shape: tuple[int, ...], axes: list[int] | None) -> Array:
    """Return an array on `buffer`, read-only if the buffer is."""
    import numpy as np

    array = np.frombuffer(buffer, dtype).reshape(shape)
    return array if axes is None else array.transpose(axes)
