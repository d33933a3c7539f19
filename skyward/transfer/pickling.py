"""Pickle what travels between caller and workers. Knows cloudpickle and nothing else of skyward but its errors.

Code is pickled by name where the other side can import it, the caller's own modules included, whose sources travel
beside the pickle: see `skyward.engine.sources`. Buffers, numpy arrays and bytes of `OUT_OF_BAND` bytes and more are
left out of the pickle and handed over beside it, uncopied.
"""

from __future__ import annotations

import contextlib
import copyreg
import dis
import functools
import importlib.util
import inspect
import pickle
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import CodeType, FunctionType, ModuleType, SimpleNamespace
from typing import Any, TypeVar

import cloudpickle

from skyward.errors import SerializationError
from skyward.transfer import arrays
from skyward.transfer.dependencies import STAND_INS

OUT_OF_BAND = 1 << 20
"""Buffers from this size on (bytes) travel beside the pickle; joblib's memmapping starts at the same size."""

_MOST_WRAPPERS = 16
"""Decorators around a function that are looked through. Chosen, not measured."""
_by_value_lock = threading.RLock()

Buffer = pickle.PickleBuffer | arrays.Memory
"""What is left out of a pickle; its method `raw` returns the bytes."""
Refer = Callable[[str], bool]
"""Hears the name of each module that a pickle refers to, and tells whether what that defines has to go by value."""


class Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    """A cloudpickle pickler that is used again and again, and tells which modules its pickles refer to."""

    def __init__(self) -> None:
        self._pieces: list[Any] = []
        self._buffers: list[tuple[int, Buffer]] = []  # each with the number of pieces before it
        self._left_out: dict[int, arrays.Memory] = {}  # by the id of the buffer that stands for it
        self._out_of_band = OUT_OF_BAND
        self._apart: object = None
        self._files: bool | None = None
        self._refer: Refer = _by_name
        self._needs: list[Any] | None = None
        super().__init__(SimpleNamespace(write=self._pieces.append), protocol=5, buffer_callback=self._keep_in_band)

    def _keep_in_band(self, buffer: pickle.PickleBuffer) -> bool:
        found: Buffer = self._left_out.pop(id(buffer), buffer)
        if found is buffer:
            with buffer.raw() as view:
                if view.nbytes < self._out_of_band:
                    return True
        self._buffers.append((len(self._pieces), found))
        return False

    def dumps(
        self, obj: object, refer: Refer, out_of_band: int, apart: object, files: bool | None, needs: list[Any] | None
    ) -> tuple[bytes, Sequence[Buffer]]:
        self._refer, self._out_of_band, self._apart, self._files = refer, out_of_band, apart, files
        self._needs = needs
        try:
            self.dump(obj)
            if len(self._pieces) == 1 and not self._buffers:
                return self._pieces[0], []
            buffers = [(at, 0, buffer) for at, buffer in self._buffers]
            buffers += [(at, 1, pickle.PickleBuffer(data)) for at, data in _take_large_bytes(self._pieces)]
            buffers.sort(key=lambda found: found[:2])
            return b"".join(self._pieces), [buffer for *_, buffer in buffers]
        finally:
            self._pieces.clear()
            self._buffers.clear()
            self._left_out.clear()
            self._refer, self._apart, self._needs = _by_name, None, None
            self.clear_memo()  # which keeps alive what was pickled

    def reducer_override(self, obj: Any) -> Any:
        if obj is self._apart and obj is not None:
            data, buffers = dumps(obj, self._refer, out_of_band=self._out_of_band, files=self._files)
            if len(data) >= OUT_OF_BAND:
                return _load_apart, (pickle.PickleBuffer(data), list(map(self._stand_in, buffers)))
        if isinstance(obj, (FunctionType, type, TypeVar)):
            return self._reduce_code(obj)
        if type(obj).__module__ == "numpy":
            return self._reduce_numpy(obj)
        if self._needs is not None and (stand_in := STAND_INS.get(type(obj))) is not None:
            return stand_in(obj, self._needs)
        if isinstance(obj, BaseException) and _carries_traceback(type(obj)):
            return obj.__reduce_ex__(5)
        # A module, or an object that may be pickled as the name of a global.
        name = obj.__name__ if isinstance(obj, ModuleType) else type(obj).__module__
        if isinstance(name, str):
            self._refer(name)
        return super().reducer_override(obj)

    def _reduce_code(self, obj: Any) -> Any:
        name = getattr(obj, "__module__", None)
        if isinstance(name, str) and self._refer(name):
            with _by_value(sys.modules[name]):
                self._refer_to_imports(obj)
                return super().reducer_override(obj)
        if isinstance(obj, type):
            if issubclass(obj, Warning) and name not in ("builtins", "__main__") and "<locals>" not in obj.__qualname__:
                return _find_warning, (name, obj.__qualname__)
        elif isinstance(obj, FunctionType):
            wrappers = count_wrappers(obj)
            if wrappers is None:
                self._refer_to_imports(obj)
            elif wrappers:
                return _unwrap, (name, obj.__qualname__, wrappers)
        return super().reducer_override(obj)

    def _refer_to_imports(self, obj: Any) -> None:
        """Tell of the modules that a function by value imports when it is called, relative to its package too."""
        if isinstance(obj, FunctionType):
            for name in (obj.__globals__.get("__package__"), *_imported(obj.__code__)):
                if name:
                    self._refer(name)

    def _reduce_numpy(self, obj: Any) -> Any:
        source = arrays.mapped(obj) if self._files is not None else None
        if source is None:
            if not arrays.is_plain(obj) or obj.nbytes < self._out_of_band:
                return NotImplemented
        elif self._files and (file := arrays.locate(obj, source)) is not None:
            return arrays.open_file, file
        memory, rest = arrays.leave_out(obj)
        if source is not None:
            rest = (*rest, source.mode == "c")
            if obj.nbytes < self._out_of_band:
                return arrays.restore, (memory.array.tobytes(), *rest)
        return arrays.restore, (self._stand_in(memory), *rest)

    def _stand_in(self, buffer: Buffer) -> pickle.PickleBuffer:
        """Return what is pickled to let `buffer` be left out."""
        if not isinstance(buffer, arrays.Memory):
            return buffer
        stand_in = pickle.PickleBuffer(bytearray())  # one that is read-only would make the array read-only
        self._left_out[id(stand_in)] = buffer
        return stand_in


def _by_name(name: str) -> bool:  # noqa: ARG001 - for what the other side can import for certain
    return False


@contextlib.contextmanager
def _by_value(module: ModuleType) -> Iterator[None]:
    # cloudpickle's registry is global; it is changed only for one object, so that the caller's own use of cloudpickle
    # elsewhere is as it was.
    with _by_value_lock:
        already = module.__name__ in cloudpickle.list_registry_pickle_by_value()
        if not already:
            cloudpickle.register_pickle_by_value(module)
        try:
            yield
        finally:
            if not already:
                cloudpickle.unregister_pickle_by_value(module)


def count_wrappers(fn: FunctionType) -> int | None:
    """Return how many decorators are around a function at its name: 0 if it is found there itself, None if not at all.

    A decorator counts if it has set ``__wrapped__``, as `functools.wraps` and `skyward.compute` do.
    """
    found: Any = sys.modules.get(fn.__module__) if fn.__module__ != "__main__" else None
    try:
        for part in fn.__qualname__.split("."):
            found = getattr(found, part)
    except AttributeError:
        return None
    for count in range(_MOST_WRAPPERS):
        if found is fn:
            return count
        found = getattr(found, "__wrapped__", None)
    return None


def _unwrap(module: str, name: str, wrappers: int) -> Any:
    found = functools.reduce(getattr, name.split("."), importlib.import_module(module))
    for _ in range(wrappers):
        found = found.__wrapped__
    return found


@functools.lru_cache(maxsize=1024)
def _imported(code: CodeType) -> tuple[str, ...]:
    """Return the modules that code imports, and what it takes out of them, as dotted names."""
    names: list[str] = []
    for instruction in dis.get_instructions(code):
        if instruction.opname == "IMPORT_NAME":
            names.append(instruction.argval)
        elif instruction.opname == "IMPORT_FROM":
            names.append(f"{names[-1]}.{instruction.argval}")
    inner = (name for const in code.co_consts if isinstance(const, CodeType) for name in _imported(const))
    return tuple(dict.fromkeys((*names, *inner)))


_BYTES = ((b"B", 4, b"bytes"), (b"\x8e", 8, b"bytes"), (b"\x96", 8, b"bytearray"))
"""Opcodes of bytes in a pickle: code, number of bytes of the length that follows, and type."""


def _take_large_bytes(pieces: list[Any]) -> list[tuple[int, bytes | bytearray]]:
    """Take large bytes out of the pieces of a pickle, and let them be made from buffers; return them with their places.

    A pickler writes bytes of more than 64 KiB uncopied and alone, after a piece that ends with their opcode and length.
    Other pieces as large as ours have a single object in a frame, such as an integer: these begin with the frame.
    """
    found = []
    for i, piece in enumerate(pieces):
        if type(piece) not in (bytes, bytearray) or len(piece) < OUT_OF_BAND or i == 0 or _is_frame(piece):
            continue
        for code, width, kind in _BYTES:
            header = code + len(piece).to_bytes(8, "little")[:width]
            if pieces[i - 1].endswith(header):
                # builtins.bytes (GLOBAL), the next buffer (NEXT_BUFFER, TUPLE1), the call (REDUCE)
                pieces[i - 1] = pieces[i - 1][: -len(header)] + b"cbuiltins\n" + kind + b"\n\x97\x85R"
                pieces[i] = b""
                found.append((i, piece))
                break
    return found


def _is_frame(piece: bytes | bytearray) -> bool:
    # What may follow a frame in its piece is an opcode with a length.
    after = len(piece) - 9 - int.from_bytes(piece[1:9], "little")
    return piece[:1] == b"\x95" and after in (0, 5, 9)


@functools.cache
def _find_warning(module: str, name: str) -> Any:
    """Return a category of warnings, or one that nothing warns with where its module is missing.

    scikit-learn sends the caller's warning filters along, and with them the categories of whatever is imported there.
    """
    try:
        return functools.reduce(getattr, name.split("."), importlib.import_module(module))
    except (ImportError, AttributeError):
        return type(name.rpartition(".")[2], (Warning,), {"__module__": module})


def loader(buffers: int) -> bytes:
    """Return a pickle that loads another one: the first of its buffers, which has so many buffers itself."""
    return b"\x80\x05cskyward.transfer.pickling\n_load_apart\n\x97](" + buffers * b"\x97" + b"e\x86R."


def _load_apart(data: Any, buffers: list[Any]) -> Any:
    return pickle.loads(data, buffers=buffers)


def _carries_traceback(kind: type[BaseException]) -> bool:
    """Tell whether tblib, which Dask installs, would pickle such exceptions with all their frames.

    The traceback travels as text; as frames it would be large, and too deep to pickle for a `RecursionError`.
    """
    return getattr(copyreg.dispatch_table.get(kind), "__module__", None) == "tblib.pickling_support"


_local = threading.local()


def dumps(
    obj: object,
    refer: Refer = _by_name,
    *,
    out_of_band: int = OUT_OF_BAND,
    apart: object = None,
    files: bool | None = None,
    needs: list[Any] | None = None,
) -> tuple[bytes, Sequence[Buffer]]:
    """Return `obj` as (pickle, buffers of `out_of_band` bytes and more).

    `apart` is an instance that `obj` may refer to: its own pickle is one of the buffers if it is as large. `files`
    tells whether the other side sees the files of this machine. If so, a `numpy.memmap` is mapped there again. If not,
    it arrives as a copy that is read-only, so that a write raises instead of being lost; with None as a plain copy.
    Objects that stand for values are replaced, and what gives these values is added to `needs`; with None they are
    pickled as they are.
    """
    pickler = getattr(_local, "pickler", None)
    if pickler is None:
        pickler = _local.pickler = Pickler()
    try:
        # While a dump runs, the pickler is taken: an object's __reduce__ may itself call into skyward.
        _local.pickler = None
        result: tuple[bytes, Sequence[Buffer]] = pickler.dumps(obj, refer, out_of_band, apart, files, needs)
    except BaseException:
        pickler = None  # its memo may hold half of what failed
        raise
    finally:
        _local.pickler = pickler
    return result


def loads(data: bytes | memoryview, buffers: Iterable[Any] = ()) -> Any:
    return pickle.loads(data, buffers=(b.raw() if isinstance(b, arrays.Memory) else b for b in buffers))


def explain_call(fn: Any, args: Sequence[Any], kwargs: dict[str, Any], cause: BaseException) -> SerializationError:
    """Find which argument, or which variable that the function uses, can't be pickled, and say so."""
    name = getattr(fn, "__qualname__", None) or type(fn).__name__
    parameters = _parameter_names(fn, args)
    for label, value in [*zip(parameters, args, strict=False), *kwargs.items()]:
        if (error := _failure(value)) is not None:
            return _error(f"argument {label!r} of {name}()", value, error)
    for kind, label, value in _captured(fn):
        if (error := _failure(value)) is not None:
            return _error(f"{kind} {label!r}, which {name}() uses,", value, error)
    return _error(f"function {name}()", fn, cause)


def _parameter_names(fn: Any, args: Sequence[Any]) -> list[str]:
    names: list[str] = []
    try:
        for parameter in inspect.signature(fn).parameters.values():
            if parameter.kind is parameter.VAR_POSITIONAL:
                names += [f"{parameter.name}[{i}]" for i in range(len(args) - len(names))]
            elif parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
                names.append(parameter.name)
    except (TypeError, ValueError):  # a builtin without a signature
        pass
    return names + [f"#{i + 1}" for i in range(len(names), len(args))]


def _captured(fn: Any) -> list[tuple[str, str, Any]]:
    fn = inspect.unwrap(fn) if callable(fn) else fn
    if not isinstance(fn, FunctionType):
        return []
    found = inspect.getclosurevars(fn)
    return [("variable", k, v) for k, v in found.nonlocals.items()] + [
        ("global variable", k, v) for k, v in found.globals.items() if not isinstance(v, ModuleType)
    ]


def _failure(value: object) -> BaseException | None:
    try:
        dumps(value)
    except Exception as exc:  # whatever an object's own __reduce__ raises
        return exc
    return None


def _error(where: str, value: object, cause: BaseException) -> SerializationError:
    kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
    error = SerializationError(
        f"{where} can't be sent to a worker: {kind} does not pickle ({cause}). "
        "Send the data that it is made from (such as a path or an address), and create it inside the function.",
        where=where,
    )
    error.__cause__ = cause
    return error


def has_module(name: str) -> bool:
    """Tell whether top-level module `name` can be imported, without importing it."""
    return name in sys.modules or importlib.util.find_spec(name) is not None
