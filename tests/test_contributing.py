"""What the pages for contributors and the CI workflow name exists: commands, files, versions."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
WORKFLOW = ".github/workflows/ci.yml"
PAGES = ["README.md", "CONTRIBUTING.md", WORKFLOW, *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/*.md"))]


def _read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES)
def test_every_make_target_that_a_page_names_exists(page: str) -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):", _read("Makefile"), re.MULTILINE))

    named = set(re.findall(r"(?:`|^|run: )make (?:[A-Z]+=\S+ )?([a-z0-9-]+)", _read(page), re.MULTILINE))

    assert named - targets == set()


def test_contributing_lists_the_commands_of_the_makefile() -> None:
    listed = set(re.findall(r"^\| `make ([a-z0-9-]+)` \|", _read("CONTRIBUTING.md"), re.MULTILINE))
    described = set(re.findall(r"^([a-z0-9-]+):.*##", _read("Makefile"), re.MULTILINE))

    assert listed == described - {"help", "types", "clean"}


def test_every_file_that_contributing_names_exists() -> None:
    named = re.findall(r"`((?:\.ci|docs|skyward|tests|tools)/[\w./-]*)`", _read("CONTRIBUTING.md"))

    assert len(named) > 10
    assert [name for name in named if "NAME" not in name and not (ROOT / name).exists()] == []


def test_ci_tests_the_versions_of_python_that_are_supported() -> None:
    classifiers = tomllib.loads(_read("pyproject.toml"))["project"]["classifiers"]
    supported = [c.rpartition(" ")[2] for c in classifiers if re.search(r"Python :: 3\.\d+$", c)]

    matrix = re.search(r"python: \[(.*)\]", _read(WORKFLOW))

    assert matrix is not None
    assert re.findall(r"[\d.]+", matrix[1]) == supported


def test_ci_may_only_read_and_pins_its_actions() -> None:
    workflow = _read(WORKFLOW)

    assert re.findall(r"permissions:\n((?:  .*\n)+)", workflow) == ["  contents: read\n"]
    assert all(re.fullmatch(r"actions/[\w-]+@v\d+", use) for use in re.findall(r"uses: (\S+)", workflow))
