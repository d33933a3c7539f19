"""Which of the caller's own modules calls refer to, as source: what workers need to import them by name.

Where workers see the caller's files they import from the same folders. Elsewhere, each own package or module goes to
each node once, as an archive that is known by its content. `skyward.transfer.sources` is what workers do with that.
"""

from __future__ import annotations

import io
import os
import pickle
import re
import sys
import tarfile
import threading
import time
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import xxhash

from skyward.engine.own_modules import CODE, NEVER_OWN, goes_by_value, installed_roots, is_installed, locate
from skyward.engine.store import Store
from skyward.errors import SerializationError
from skyward.transfer.sources import this_process
from skyward.transfer.wire import BlobRef, Facts, Source

MAX_BYTES = 64 << 20
"""Most bytes of one package, with its data, that travel with calls. Chosen, not measured."""
REST_S = 20e-6
"""Seconds per file between two looks, where not every call has to look: about ten times what a look takes."""
_SKIPPED = frozenset({"__pycache__", "node_modules"})


_IMPORT = re.compile(
    r"""(?:^|[;:])[ \t]*(?:
            from\b[ \t]*(\.*)[ \t]*([\w.]*)[ \t]+import\b[ \t]*(\([^)]*\)|(?:[^\n;\#\\]|\\\n)*)
          | import[ \t]+([^\n;\#]+)
        )
      | (?:import_module|__import__)\(\s*["']([\w.]+)["']""",
    re.MULTILINE | re.VERBOSE,
)


def _imports(text: str, package: str) -> Iterator[str]:
    """Yield the names of the modules that source imports anywhere, and some more that are none."""
    for dots, origin, names, modules, literal in _IMPORT.findall(text):
        for clause in modules.split(","):
            yield from clause.split()[:1]
        if literal:
            yield literal
        if dots or origin:
            parents = package.split(".")
            base = [*parents[: len(parents) - len(dots) + 1], origin] if dots else [origin]
            start = ".".join(filter(None, base))
            yield start
            for clause in names.strip("()").split(","):
                yield from (f"{start}.{word}" for word in clause.split()[:1])


class _Unit:
    """An own package or module, as it is on disk: its code, and the package's data if `has_data`."""

    def __init__(self, name: str, file: str, *, is_package: bool, has_data: bool) -> None:
        self.name = name
        self._origin = file
        self._has_data = has_data
        self.file = os.path.abspath(file)  # noqa: PTH100 - links are kept
        self.is_package = is_package
        self.version = ""
        self.imports: set[str] = set()
        self.archive: BlobRef | None = None
        self.packed = ""  # the version of `archive`
        self.superseded: BlobRef | None = None
        self._stats: dict[str, tuple[int, int]] = {}
        self._read: dict[str, tuple[bytes, set[str]]] = {}

    @property
    def inside(self) -> str:
        """Path of `file` in the archive."""
        folders = self.name.replace(".", "/")
        base = Path(self.file).name
        return f"{folders}/{base}" if self.is_package else folders + base[base.index(".") :]

    @property
    def size(self) -> int:
        """How many files and folders it has."""
        return len(self._stats)

    def is_replaced(self) -> bool:
        """Tell whether the caller has another module under its name by now."""
        module = sys.modules.get(self.name)
        return module is not None and getattr(module, "__file__", None) != self._origin

    def has_changed(self) -> bool:
        try:
            return any(_stat(path) != seen for path, seen in self._stats.items())
        except OSError:
            return True

    def scan(self) -> None:
        """Find its version, and the modules that it imports."""
        stats: dict[str, tuple[int, int]] = {}
        read: dict[str, tuple[bytes, set[str]]] = {}
        hasher = xxhash.xxh3_128()
        for inside, path in self.files():
            try:
                stats[path] = _stat(path)
                known = self._read.get(path) if self._stats.get(path) == stats[path] else None
                read[path] = known or self._look_into(inside, path, stats[path])
            except OSError:  # removed meanwhile
                continue
            hasher.update(inside.encode() + b"\0" + read[path][0])
        self._stats, self._read, self.version = stats, read, hasher.hexdigest()
        self.imports = set().union(*(names for _, names in read.values()))

    def _look_into(self, inside: str, path: str, seen: tuple[int, int]) -> tuple[bytes, set[str]]:
        if not path.endswith(".py"):
            return (b"" if Path(path).is_dir() else repr(seen).encode()), set()
        data = Path(path).read_bytes()
        package = inside.rpartition("/")[0].replace("/", ".")
        return xxhash.xxh3_128_digest(data), set(_imports(data.decode(errors="replace"), package))

    def files(self) -> Iterator[tuple[str, str]]:
        """Yield (path in the archive, path), in order; of folders too, whose time tells of files that come and go."""
        if not Path(self.file).is_file():  # in a zip file
            found = next((p for p in Path(self.file).parents if p.is_file()), None)
            if found is not None:
                yield "", str(found)
        elif self.is_package:
            for inside, path, is_folder in _walk(str(Path(self.file).parent), self.inside.rpartition("/")[0], set()):
                if is_folder or self._has_data or path.endswith(CODE):
                    yield inside, path
        else:
            yield self.inside, self.file

    def pack(self) -> bytes:
        """Return it as a compressed archive.

        Raises
        ------
        SerializationError
            It has more than `MAX_BYTES`.
        """
        total, packed = 0, io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w:gz", compresslevel=1) as tar:
            for info, data in self._members():
                with data:
                    total += info.size
                    if total > MAX_BYTES:
                        raise SerializationError(
                            f"module {self.name!r} can't travel to a worker: {Path(self.file).parent} has more than "
                            f"{MAX_BYTES / 1e6:.0f} MB. Keep data outside of the package, or put the package into the "
                            f"image: sky.Image(include=[{self.name.partition('.')[0]!r}])",
                            where=f"module {self.name!r}",
                        )
                    tar.addfile(info, data)
        return packed.getvalue()

    def _members(self) -> Iterator[tuple[tarfile.TarInfo, Any]]:
        for inside, path in self.files():
            if not inside:
                yield from _members_of_zip(path, self.file, self.inside)
            elif Path(path).is_file():
                info = tarfile.TarInfo(inside)
                found = Path(path).stat()
                info.size, info.mtime, info.mode = found.st_size, int(found.st_mtime), 0o600 | found.st_mode & 0o100
                yield info, Path(path).open("rb")  # noqa: SIM115 - closed by `pack`


def _stat(path: str) -> tuple[int, int]:
    found = os.stat(path)  # noqa: PTH116 - asked of each file for each call
    return found.st_mtime_ns, found.st_size


def _walk(folder: str, inside: str, seen: set[str]) -> Iterator[tuple[str, str, bool]]:
    real = os.path.realpath(folder)  # links may lead in circles
    try:
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda e: e.name)
    except OSError:  # removed meanwhile
        return
    if real in seen or any(e.name == "pyvenv.cfg" for e in entries):
        return
    seen.add(real)
    yield inside, folder, True
    for entry in entries:
        if entry.is_dir():
            if entry.name not in _SKIPPED and not entry.name.startswith("."):
                yield from _walk(entry.path, f"{inside}/{entry.name}", seen)
        elif entry.is_file():
            yield f"{inside}/{entry.name}", entry.path, False


def _members_of_zip(path: str, file: str, inside: str) -> Iterator[tuple[tarfile.TarInfo, Any]]:
    """Yield the module whose `file` is in a zip file, or all of its package; `inside` is its name in the archive."""
    folder = file.removeprefix(path + os.sep).removesuffix(inside)
    wanted = folder + (inside.rpartition("/")[0] + "/" if Path(inside).stem == "__init__" else inside)
    with zipfile.ZipFile(path) as zipped:
        for member in zipped.infolist():
            if member.filename.startswith(wanted) and not member.is_dir():
                info = tarfile.TarInfo(member.filename.removeprefix(folder))
                info.size = member.file_size
                yield info, zipped.open(member)


class Sources:
    """Which of the caller's own modules the pickles of one engine refer to, and what workers are told of them.

    Parameters
    ----------
    store
        Keeps the archives.
    ship
        Whether workers see none of the caller's files.
    included
        Top-level names that the image's `include` brings to the machines.
    """

    def __init__(self, store: Store, *, ship: bool, included: Sequence[str] = ()) -> None:
        self._store = store
        self._ship = ship
        self._included = frozenset(included)
        self._lock = threading.RLock()
        self._names: dict[str, bool] = {}  # modules that were referred to: whether they go by value
        self._units: dict[str, _Unit] = {}
        self._installed: set[str] = set()
        self._sent_units: set[str] = set()  # units that are in `facts`
        self._gone: set[str] = set()  # units that were replaced by modules which are not own
        self._is_new = False
        self._path: list[str] | None = None
        self._looked_at = 0.0
        self._files = 0
        self.facts: tuple[bytes, tuple[BlobRef, ...]] = (b"", ())
        """Pickled `Facts`, and the archives that belong to them."""

    def refer(self, name: str) -> bool:
        """Take note that a pickle refers to module `name`; tell whether what that defines has to go by value."""
        known = self._names.get(name)
        if known is not None:
            return known
        with self._lock:
            by_value = goes_by_value(name, ship=self._ship)
            unit = None if by_value else self._find(name)
            if unit or name in sys.modules:  # else it may appear later
                self._names[name] = by_value
            return by_value

    def look(self, rest_s: float = 0.0) -> None:
        """Bring `facts` up to date: modules that are new, changed or imported by others.

        Files are not looked at again before `rest_s` seconds for each of them have passed since the last look.

        Raises
        ------
        SerializationError
            A package is too large.
        """
        moved = not self._ship and sys.path != self._path
        if not (self._units or moved):
            return
        if not (moved or self._is_new) and time.monotonic() < self._looked_at + rest_s * self._files:
            return
        with self._lock:
            for name in [name for name, unit in self._units.items() if unit.is_replaced()]:
                del self._units[name]
                self._gone.add(name)
                self._names.clear()
                self._is_new = True
            changed = [unit for unit in self._units.values() if unit.has_changed()]
            for unit in changed:
                unit.scan()
            if changed or moved or self._is_new:
                try:
                    self._follow_imports()
                    self._publish()
                except BaseException:
                    # Calls that do not refer to what is new are not to fail with this one.
                    self._units = {name: unit for name, unit in self._units.items() if name in self._sent_units}
                    self._names.clear()
                    raise
                self._sent_units, self._is_new = set(self._units), False
            self._files = sum(unit.size for unit in self._units.values())
            self._looked_at = time.monotonic()

    def _follow_imports(self) -> None:
        known = 0
        while known < len(self._units):
            known = len(self._units)
            for name in set().union(*(unit.imports for unit in self._units.values())):
                if name.partition(".")[0] not in self._installed:
                    self._find(name)

    def _find(self, name: str) -> _Unit | None:
        """Return what is own on the dotted name, which need not be loaded; None: nothing, as far as can be seen."""
        parts, path = name.split("."), None
        if parts[0] in NEVER_OWN or not all(map(str.isidentifier, parts)):
            return None
        for count in range(1, len(parts) + 1):
            prefix = ".".join(parts[:count])
            if prefix in self._units or prefix in self._installed:
                return self._units.get(prefix)
            file, path = locate(prefix, path)
            if file is not None:
                if is_installed(prefix, file):
                    self._installed.add(prefix)
                    return None
                # Where files are shared, calls may write their results beside the code.
                unit = self._units[prefix] = _Unit(prefix, file, is_package=path is not None, has_data=self._ship)
                unit.scan()
                self._is_new = True
                return unit
            if path is None:
                return None
        return None

    def _publish(self) -> None:
        if self._ship:
            for unit in self._units.values():
                self._archive(unit)
        sources = [
            Source(unit.name, unit.version, unit.inside if self._ship else unit.file, unit.is_package, unit.archive)
            for unit in self._units.values()
            if unit.archive or not self._ship
        ]
        self._path = list(sys.path)
        path = [] if self._ship else [os.path.abspath(p) for p in sys.path]  # noqa: PTH100 - '' is the cwd
        mine = tuple(p for p in path if not (p + os.sep).startswith(installed_roots()))
        facts = Facts(this_process(), mine, tuple(sources), tuple(self._gone - self._units.keys()))
        self.facts = pickle.dumps(facts, 5), tuple(s.archive for s in sources if s.archive)

    def _archive(self, unit: _Unit) -> None:
        if unit.packed == unit.version:
            return
        try:
            archive = self._store.put(memoryview(unit.pack()))
        except SerializationError:
            if unit.name.partition(".")[0] not in self._included:
                raise
            archive = None
        # The one before may be on its way yet: it is kept until there is a third one.
        if unit.superseded is not None:
            self._store.release((unit.superseded,))
        unit.superseded, unit.archive, unit.packed = unit.archive, archive, unit.version
