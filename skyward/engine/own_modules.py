"""Which modules are the caller's own: part of neither Python nor an installed package."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import site
import sys
import sysconfig
from importlib.machinery import all_suffixes
from pathlib import Path

NEVER_OWN = frozenset({"skyward", "skyward_joblib", "__main__", "__mp_main__"})
CODE = tuple(all_suffixes())
"""How the names of files end that can be imported."""


@functools.cache
def installed_roots() -> tuple[str, ...]:
    paths = sysconfig.get_paths()
    roots = {paths[k] for k in ("stdlib", "platstdlib", "purelib", "platlib")}
    roots.update(site.getsitepackages() if hasattr(site, "getsitepackages") else ())
    roots.add(site.getusersitepackages())
    roots.add(str(Path(sys.base_prefix) / "lib"))
    return tuple(sorted({str(Path(r).resolve()) + os.sep for r in roots} | {r.rstrip(os.sep) + os.sep for r in roots}))


def is_installed(name: str, file: str) -> bool:
    """Tell whether a module is part of Python or of an installed package.

    It is when its file is in the standard library, in any folder named ``site-packages`` or ``dist-packages``, in an
    egg, or beside the metadata of a distribution that lists it, as after ``pip install --target``. An editable install
    is not: its metadata lies elsewhere.
    """
    real = str(Path(file).resolve())
    parts = Path(real).parts
    if real.startswith(installed_roots()) or file.startswith(installed_roots()):
        return True
    if "site-packages" in parts or "dist-packages" in parts or any(p.endswith(".egg") for p in parts):
        return True
    folder = Path(file).parent
    for _ in range(name.count(".") + Path(file).name.startswith("__init__.")):
        folder = folder.parent
    return name.partition(".")[0] in _listed(str(folder))


@functools.cache
def _listed(folder: str) -> frozenset[str]:
    """Return the top-level names that the distributions in a folder have installed there."""
    found = importlib.metadata.distributions(path=[folder])
    lists = (d.read_text("RECORD") or d.read_text("installed-files.txt") for d in found)
    lines = (line for text in lists if text for line in text.splitlines())
    return frozenset(line.removeprefix("../").partition("/")[0].partition(".")[0] for line in lines)


def goes_by_value(name: str, *, ship: bool) -> bool:
    """Tell whether workers can't import the loaded module `name`, so that what it defines has to travel by value."""
    module = sys.modules.get(name)
    if module is None or name.partition(".")[0] in NEVER_OWN:
        return False  # cloudpickle itself knows what to do
    file, loader = getattr(module, "__file__", None), getattr(module, "__loader__", None)
    if file is None:
        top = sys.modules.get(name.partition(".")[0])
        made_here = getattr(module, "__spec__", None) is None and not hasattr(module, "__path__")
        return made_here and getattr(top, "__spec__", None) is None and getattr(top, "__file__", None) is None
    # pytest rewrites test modules and imports them itself; on another machine there may be no pytest to import.
    if ship and type(loader).__module__.startswith("_pytest."):
        return not is_installed(name, file)
    is_there = os.path.exists(file) or hasattr(loader, "archive")  # noqa: PTH110 - as in a zip file
    return not (is_there and file.endswith(CODE)) and not is_installed(name, file)


def locate(name: str, path: list[str] | None) -> tuple[str | None, list[str] | None]:
    """Return a module's file, and where a package has its modules, without importing what is not loaded.

    A namespace package has no file; a module without one, or that its name does not lead to, is (None, None).
    """
    module = sys.modules.get(name)
    if module is not None:
        file, found = getattr(module, "__file__", None), getattr(module, "__path__", None)
    else:
        specs = (finder.find_spec(name, path) for finder in sys.meta_path)
        spec = next(filter(None, specs), None)
        file = spec.origin if spec is not None and spec.has_location else None
        found = spec.submodule_search_locations if spec is not None else None
    if file is not None and not file.endswith(CODE):
        return None, None
    return file, None if found is None else list(found)
