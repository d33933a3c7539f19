"""Pickle what travels between caller and workers. Knows cloudpickle and nothing else of skyward but its errors.

Code that the other side can't import, because it is the caller's own project, travels by value; buffers, numpy arrays
and bytes of `OUT_OF_BAND` bytes and more are left out of the pickle and handed over beside it, uncopied.
"""

from __future__ import annotations

import copyreg
import functools
import importlib.util
import inspect
import pickle
import site
import sys
import sysconfig
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

import cloudpickle

from skyward import arrays
from skyward.errors import SerializationError

OUT_OF_BAND = 1 << 20
"""Buffers from this size on (bytes) travel beside the pickle; joblib's memmapping starts at the same size."""

_OWN = ("skyward", "skyward_joblib")
_by_value_lock = threading.RLock()

Buffer = pickle.PickleBuffer | arrays.Memory
"""What is left out of a pickle; its method `raw` returns the bytes."""


class Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    """A cloudpickle pickler that is used again and again, and sends the caller's own modules by value."""

    def __init__(self) -> None:
        self._pieces: list[Any] = []
        self._buffers: list[tuple[int, Buffer]] = []  # each with the number of pieces before it
        self._left_out: dict[int, arrays.Memory] = {}  # by the id of the buffer that stands for it
        self._out_of_band = OUT_OF_BAND
        self._apart: object = None
        self._files: bool | None = None
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
        self, obj: object, out_of_band: int, apart: object, files: bool | None
    ) -> tuple[bytes, Sequence[Buffer]]:
        self._out_of_band, self._apart, self._files = out_of_band, apart, files
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
            self._apart = None
            self.clear_memo()  # which keeps alive what was pickled

    def reducer_override(self, obj: Any) -> Any:
        if obj is self._apart and obj is not None:
            data, buffers = dumps(obj, out_of_band=self._out_of_band, files=self._files)
            if len(data) >= OUT_OF_BAND:
                return _load_apart, (pickle.PickleBuffer(data), list(map(self._stand_in, buffers)))
        if isinstance(obj, (FunctionType, type)):
            name = getattr(obj, "__module__", None)
        elif isinstance(obj, ModuleType) and is_project_module(obj.__name__):
            return _reduce_module(obj)
        elif type(obj).__module__ == "numpy":
            return self._reduce_numpy(obj)
        elif isinstance(obj, BaseException) and _carries_traceback(type(obj)):
            return obj.__reduce_ex__(5)
        else:
            return super().reducer_override(obj)
        if not name or not is_project_module(name):
            if isinstance(obj, type) and issubclass(obj, Warning) and name != "builtins":
                return _find_warning, (name, obj.__qualname__)
            return super().reducer_override(obj)
        # cloudpickle's registry is global; it is changed only for this one object, so that the caller's own
        # use of cloudpickle elsewhere is as it was.
        module = sys.modules[name]
        with _by_value_lock:
            already = name in cloudpickle.list_registry_pickle_by_value()
            if not already:
                cloudpickle.register_pickle_by_value(module)
            try:
                return super().reducer_override(obj)
            finally:
                if not already:
                    cloudpickle.unregister_pickle_by_value(module)


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
    return b"\x80\x05cskyward.pickling\n_load_apart\n\x97](" + buffers * b"\x97" + b"e\x86R."


def _load_apart(data: Any, buffers: list[Any]) -> Any:
    return pickle.loads(data, buffers=buffers)


def _carries_traceback(kind: type[BaseException]) -> bool:
    """Tell whether tblib, which Dask installs, would pickle such exceptions with all their frames.

    The traceback travels as text; as frames it would be large, and too deep to pickle for a `RecursionError`.
    """
    return getattr(copyreg.dispatch_table.get(kind), "__module__", None) == "tblib.pickling_support"


def _reduce_module(module: ModuleType) -> Any:
    # The contents are set after the module is made: modules refer to themselves and to each other in circles.
    return _make_module, (module.__name__,), _contents(module), None, None, _fill_module


def _make_module(name: str) -> ModuleType:
    return ModuleType(name)


def _fill_module(module: ModuleType, contents: dict[str, Any]) -> None:
    vars(module).update(contents)


_NOT_CONTENTS = {"__builtins__", "__cached__", "__loader__", "__spec__"}
_unsendable: dict[str, tuple[int, frozenset[str] | None]] = {}
"""By module: a hash of its contents, and the names that can't travel; None while that is being found out."""


def _contents(module: ModuleType) -> dict[str, Any]:
    """Return what the module holds, without what can't travel: a lock in a module must not keep it at home."""
    held = {k: v for k, v in vars(module).items() if k not in _NOT_CONTENTS}
    state = hash(tuple((k, id(v)) for k, v in held.items()))
    known = _unsendable.get(module.__name__)
    if known is None or known[0] != state:
        _unsendable[module.__name__] = (state, None)
        failing = frozenset(k for k, v in held.items() if _failure(v) is not None)
        known = _unsendable[module.__name__] = (state, failing)
    if known[1] is None:  # reached from itself: an empty one will do to find out about the others
        return {}
    return {k: v for k, v in held.items() if k not in known[1]}


@functools.cache
def _installed_roots() -> tuple[str, ...]:
    paths = sysconfig.get_paths()
    roots = {paths[k] for k in ("stdlib", "platstdlib", "purelib", "platlib")}
    roots.update(site.getsitepackages() if hasattr(site, "getsitepackages") else ())
    roots.add(site.getusersitepackages())
    roots.add(str(Path(sys.base_prefix) / "lib"))
    return tuple(sorted({str(Path(r).resolve()) + "/" for r in roots} | {r.rstrip("/") + "/" for r in roots}))


@functools.cache
def _is_project_file(file: str) -> bool:
    path = str(Path(file).resolve())
    roots = _installed_roots()
    return not (path.startswith(roots) or file.startswith(roots) or "/dist-packages/" in path)


def is_project_module(name: str) -> bool:
    """Tell whether module `name` is the caller's own code, which workers can't be expected to have installed.

    True for modules loaded from a Python file outside the standard library and every site-packages folder.
    ``__main__`` needs no help: cloudpickle always sends it by value.
    """
    if name == "__main__" or name.partition(".")[0] in _OWN:
        return False
    module = sys.modules.get(name)
    file = getattr(module, "__file__", None)
    if not file or not file.endswith((".py", ".pyc")):
        return False
    return _is_project_file(file)


_local = threading.local()


def dumps(
    obj: object, *, out_of_band: int = OUT_OF_BAND, apart: object = None, files: bool | None = None
) -> tuple[bytes, Sequence[Buffer]]:
    """Return `obj` as (pickle, buffers of `out_of_band` bytes and more).

    `apart` is an instance that `obj` may refer to: its own pickle is one of the buffers if it is as large. `files`
    tells whether the other side sees the files of this machine. If so, a `numpy.memmap` is mapped there again. If not,
    it arrives as a copy that is read-only, so that nobody writes into it in vain; with None as a plain copy.
    """
    pickler = getattr(_local, "pickler", None)
    if pickler is None:
        pickler = _local.pickler = Pickler()
    try:
        # While a dump runs, the pickler is taken: an object's __reduce__ may itself call into skyward.
        _local.pickler = None
        result: tuple[bytes, Sequence[Buffer]] = pickler.dumps(obj, out_of_band, apart, files)
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
        "Send what it is made from (a path, an address, a configuration) and make it inside the function.",
        where=where,
    )
    error.__cause__ = cause
    return error


def has_module(name: str) -> bool:
    """Tell whether top-level module `name` can be imported, without importing it."""
    return name in sys.modules or importlib.util.find_spec(name) is not None
