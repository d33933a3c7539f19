"""The caller's own modules on a worker: found by their names, in the caller's folders or in archives that have come.

`skyward.engine.sources` tells which there are.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import os
import pickle
import shutil
import sys
import tarfile
import tempfile
import threading
import uuid
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

from skyward.transfer.wire import BlobRef, Facts, Source

_TICK_S = 2.0
"""Seconds within which a source and its bytecode may be of different versions: bytecode has its source's time in whole
seconds (https://docs.python.org/3/reference/import.html, "Cached bytecode invalidation")."""

is_outdated: bool = False
"""Whether this process has imported an older version of an own module, and has to end before another call runs."""
preloaded_at: float | None = None
"""When, since the epoch, the process that this one was forked from began to import modules; None: it imports none."""
_id = uuid.uuid4().hex
_latest = b""
_places: dict[str, str] = {}  # where archives were unpacked, by module
_lock = threading.Lock()


def this_process() -> str:
    """Return a name that no other process has, forks of this one included."""
    return f"{_id}-{os.getpid()}"


class _Loader(SourceFileLoader):
    def path_stats(self, path: Any) -> Any:
        found = super().path_stats(path)
        cached = importlib.util.cache_from_source(path)
        with contextlib.suppress(FileNotFoundError):
            if abs(Path(cached).stat().st_mtime - found["mtime"]) < _TICK_S:
                raise PermissionError(cached)  # importlib then compiles the source, and writes nothing
        return found


class _Finder(MetaPathFinder):
    """Finds own modules before all others, so that an installed one of the same name does not hide them."""

    def __init__(self) -> None:
        self.sources: dict[str, Source] = {}

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        source = self.sources.get(name)
        spec: ModuleSpec | None
        if source is not None:
            spec = _spec(source)
        elif any(name.startswith(f"{own}.") for own in self.sources):
            spec = PathFinder.find_spec(name, path, target)
        elif any(own.startswith(f"{name}.") for own in self.sources):
            found = PathFinder.find_spec(name, path, target)
            return found or ModuleSpec(name, None, is_package=True)  # a namespace package
        else:
            return None
        if spec is not None and type(spec.loader) is SourceFileLoader:
            spec.loader = _Loader(name, spec.loader.path)
        return spec


def _spec(source: Source) -> ModuleSpec | None:
    file = Path(source.file)
    if file.is_file():
        inner = [str(file.parent)] if source.is_package else None
        return importlib.util.spec_from_file_location(source.name, file, submodule_search_locations=inner)
    return PathFinder.find_spec(source.name, [str(file.parent.parent if source.is_package else file.parent)])


_finder = _Finder()


def install(data: bytes, read: Callable[[BlobRef], Any], folder: str, *, may_restart: bool) -> bool:
    """Make the modules of pickled `Facts` importable here, in their present version.

    Parameters
    ----------
    read
        Returns an archive.
    folder
        Where archives are unpacked.
    may_restart
        Whether this process may end for the sake of a new version. Otherwise it forgets all own modules that it has
        imported, and imports them again: the classes, caches and registries in them are new, but what others keep of
        the old ones stays, and so do compiled extensions.

    Returns
    -------
    False when this process has to end.
    """
    global _latest, is_outdated
    if data == _latest or not data:
        return not is_outdated
    with _lock:
        facts: Facts = pickle.loads(data)
        if facts.sender == this_process():  # a worker in the caller's process has the caller's modules
            return True
        known = _finder.sources
        now = {source.name: source.version for source in facts.sources} | dict.fromkeys(facts.gone, "")
        old = [n for n in now.keys() & known.keys() & sys.modules.keys() if known[n].version != now[n]]
        if is_outdated or (old and may_restart):
            is_outdated = True
            return False
        for name in list(known) if old else []:
            _forget(name)
        for name in facts.gone:
            known.pop(name, None)
        for source in facts.sources:
            if source.archive is not None:
                place = str(_unpack(source.archive, read, Path(folder)))
                source = source._replace(file=f"{place}/{source.file}")
                _put_on_path(source.name, place)
            was_edited = source.name not in known and _changed_since_fork(source.name)
            if was_edited or not _is_from(sys.modules.get(source.name), source.file):
                _forget(source.name)
            known[source.name] = source
        sys.path += [entry for entry in facts.path if entry not in sys.path]
        if _finder not in sys.meta_path:
            sys.meta_path.insert(0, _finder)
        importlib.invalidate_caches()
        _latest = data
    return True


def _put_on_path(name: str, place: str) -> None:
    """Let processes that calls start find a module too, which know `sys.path` and no finders."""
    before = _places.get(name)
    if before != place:
        if before in sys.path:
            sys.path.remove(before)
        sys.path.append(place)
        _places[name] = place


def _forget(name: str) -> None:
    for loaded in list(sys.modules):
        if loaded == name or loaded.startswith(f"{name}."):
            del sys.modules[loaded]


def _changed_since_fork(name: str) -> bool:
    """Tell whether a file of a package has changed since the process that this one was forked from imported it."""
    if preloaded_at is None:
        return False
    for loaded, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file is not None and (loaded == name or loaded.startswith(f"{name}.")):
            with contextlib.suppress(OSError):  # gone, or in a zip file
                if Path(file).stat().st_mtime >= preloaded_at:
                    return True
    return False


def _is_from(module: ModuleType | None, file: str) -> bool:
    mine = getattr(module, "__file__", None) or ""
    with contextlib.suppress(OSError):  # one of them is in a zip file, or not there
        return mine == file or os.path.samefile(mine, file)  # noqa: PTH121
    return False


def _unpack(archive: BlobRef, read: Callable[[BlobRef], Any], folder: Path) -> Path:
    place = folder / f"sources-{archive.digest}"
    if not place.is_dir():
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix="sources-", dir=folder))
        try:
            with tarfile.open(fileobj=io.BytesIO(read(archive)), mode="r:gz") as tar:
                for member in tar:
                    _extract(tar, member, part)
            part.rename(place)
        except OSError:
            if not place.is_dir():  # another slot was faster
                raise
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return place


def _extract(tar: tarfile.TarFile, member: tarfile.TarInfo, folder: Path) -> None:
    # By hand, because `tarfile.data_filter` is not in all releases of Python 3.11.
    target = folder / member.name
    data = tar.extractfile(member) if member.isfile() else None
    if data is None or not target.resolve().is_relative_to(folder.resolve()):
        raise PermissionError(f"{member.name} is no file inside the archive")
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("wb") as file:
        shutil.copyfileobj(data, file)
    target.chmod(member.mode & 0o700)
