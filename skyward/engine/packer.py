"""Packs calls: once each, in the thread that makes them."""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any

import xxhash

from skyward.engine.calls import Call, Item
from skyward.engine.captured import captured
from skyward.engine.sources import REST_S, Sources
from skyward.engine.store import SeenBuffers, Store
from skyward.engine.writable import WritableArrays
from skyward.errors import SerializationError, SkywardError
from skyward.transfer import pickling
from skyward.transfer.wire import Access, FunctionRef

_APART_BYTES = 64 << 20
"""Pickled arguments of so many bytes travel as large buffers do: messages would be copied several times."""
_FUNCTIONS_BYTES = 16 << 20
"""Bytes of pickled functions after which a group forgets those that it knows. Chosen, not measured."""


class Packer:
    """Packs the calls of one group: each function once, each large buffer once per identity.

    With `unchanged`, the caller's code does not run between two calls, so functions and arrays stay as they were.
    Otherwise both are looked at again for each call: see `SeenBuffers` and `captured`. Own modules are looked at for
    the first call, if `eager`, and then after a rest: see `Sources.look`. `access` is how calls see the large buffers;
    None: read-only.
    """

    def __init__(
        self,
        store: Store,
        sources: Sources,
        *,
        unchanged: bool = False,
        access: Access | None = None,
        eager: bool = True,
    ) -> None:
        self._store = store
        self._sources = sources
        self._rest_s = 0.0 if eager else REST_S
        self._unchanged = unchanged
        self._seen: SeenBuffers | WritableArrays = SeenBuffers(store, unchanged=unchanged)
        if access is not None and access.mode == "r+":
            self._seen = WritableArrays(store, over=access.over)
        self._out_of_band = pickling.OUT_OF_BAND
        if access is not None and access.mode != "c":
            self._out_of_band = min(self._out_of_band, access.over + 1)
        self._functions: dict[int, _Packed] = {}
        self._functions_bytes = 0
        self._large: Any = None  # the last object of a bound method that was large when pickled

    def pack(self, call: Call, index: int = 0, sink: Any = None) -> Item:
        """Pickle `call`.

        Raises
        ------
        SerializationError
            The function or an argument can't be pickled; the message names it.
        """
        fn: Any = call.fn
        args, kwargs, owner = call.args, dict(call.kwargs), call.owner
        if isinstance(fn, MethodType):  # its object is an argument as any other
            fn, owner = fn.__func__, fn.__self__
            args = (owner, *args)
        before = self._store.written_bytes
        needs: list[Any] = []
        try:
            function = self._function(fn)
            apart = owner if owner is self._large else None
            data, buffers = self._dumps((args, kwargs), needs, apart)
            if len(data) >= pickling.OUT_OF_BAND and owner is not None:
                self._large = owner
                needs.clear()
                data, buffers = self._dumps((args, kwargs), needs, owner)
            self._sources.look(self._rest_s)
            self._rest_s = math.inf if self._unchanged else REST_S
        except (SkywardError, MemoryError):
            raise
        except Exception as exc:  # whatever an object's own __reduce__ raises
            raise pickling.explain_call(fn, args, kwargs, exc) from exc
        refs = tuple(self._seen.put(b) for b in buffers)
        if len(data) >= _APART_BYTES:
            refs = (self._store.put(memoryview(data)), *refs)
            data = pickling.loader(len(buffers))
        size = len(data) + self._store.written_bytes - before
        return Item(call, index, function, data, refs, size, sink, tuple(needs))

    def _dumps(
        self, obj: object, needs: list[Any], apart: object = None
    ) -> tuple[bytes, Sequence[pickling.Buffer]]:
        refer, files = self._sources.refer, self._store.has_files
        return pickling.dumps(obj, refer, out_of_band=self._out_of_band, apart=apart, files=files, needs=needs)

    def close(self) -> None:
        """Let go of what is kept for the group. Nothing more is packed."""
        self._large = None
        if isinstance(self._seen, WritableArrays):
            self._seen.close()

    def _function(self, fn: Callable[..., Any]) -> FunctionRef:
        known = self._functions.get(id(fn))
        if (
            known is not None
            and (self._unchanged or known.is_same())
            and (not known.ref.buffers or self._store.reuse(known.ref.buffers))
        ):
            return known.ref
        state = None if self._unchanged else captured(fn)
        needs: list[Any] = []
        data, buffers = self._dumps(fn, needs)
        if needs:
            name = getattr(fn, "__qualname__", type(fn).__name__)
            raise SerializationError(
                f"function {name}() refers to {needs[0]!r}, whose value is on the cluster or not there yet: pass it to "
                f"{name}() as an argument",
                where=f"function {name}()",
            )
        refs = tuple(self._seen.put(b) for b in buffers)
        hasher = xxhash.xxh3_128(data)
        for ref in refs:
            hasher.update(ref.digest.encode())
        digest = hasher.hexdigest()
        if known is None or known.ref.digest != digest:
            if len(data) > 1 << 20:
                _warn_of_large(fn, len(data))
            known = _Packed(fn, FunctionRef(digest, data, refs), None)
        known.state = state
        self._functions_bytes += len(data)
        if len(self._functions) >= 256 or self._functions_bytes > _FUNCTIONS_BYTES:  # a stream of lambdas, for example
            self._functions.clear()
            self._functions_bytes = len(data)
        self._functions[id(fn)] = known
        return known.ref


@dataclass(slots=True)
class _Packed:
    """A function that was pickled, and what it had captured then. Keeps `fn`, so that no other object gets its id."""

    fn: Callable[..., Any]
    ref: FunctionRef
    state: list[Any] | None

    def is_same(self) -> bool:
        """Tell whether the function would certainly be pickled to the same again."""
        if self.state is None:
            return False
        now = captured(self.fn)
        return now is not None and len(now) == len(self.state) and all(map(operator.is_, now, self.state))


def _warn_of_large(fn: Callable[..., Any], size: int) -> None:
    name = getattr(fn, "__qualname__", type(fn).__name__)
    warnings.warn(
        f"function {name}() weighs {size / 1e6:.1f} MB when pickled, mostly what it captures, and travels with "
        "every chunk of calls; pass large objects as arguments instead",
        stacklevel=2,
    )
