"""Imports point one way, and never in a circle; `.importlinter` says which. Names of tests are short."""

from __future__ import annotations

import graphlib
import re
import subprocess
import sys
from pathlib import Path

import grimp

ROOT = Path(__file__).parent.parent


def test_every_module_imports_only_what_its_layer_may() -> None:
    lint = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    command = [sys.executable, "-c", lint, "--no-cache", "--no-logo"]

    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)

    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_no_modules_import_one_another_in_a_circle() -> None:
    graph = grimp.build_graph("skyward", "skyward_joblib", exclude_type_checking_imports=True)
    imported = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}

    graphlib.TopologicalSorter(imported).prepare()  # raises CycleError, which names the circle


def test_skyward_has_at_most_15_modules_side_by_side() -> None:
    modules = [path for path in (ROOT / "skyward").glob("*.py") if path.name != "__init__.py"]

    assert len(modules) <= 15


def test_no_name_of_a_test_is_longer_than_70_characters() -> None:
    files = (ROOT / "tests").rglob("test_*.py")
    names = [name for file in files for name in re.findall(r"def (test_\w+)", file.read_text(encoding="utf-8"))]

    assert len(names) > 1000
    assert [name for name in names if len(name) > 70] == []
