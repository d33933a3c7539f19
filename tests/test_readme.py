"""Every Python block of README.md and docs/ runs as a script of its own, or says why not: `{no-run="…"}`."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import skyward as sky
from skyward import errors, events

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", *sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs").rglob("*.md"))]
LANGUAGES = {"", "console", "json", "python", "sh", "toml"}


def _fences(page: str) -> list[tuple[str, int, str, str]]:
    """Return page, line, what stands behind the opening marks, and content of each block."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.finditer(r"^ *```([^`\n]*)\n(.*?)^ *```$", text, re.DOTALL | re.MULTILINE)
    return [(page, text.count("\n", 0, m.start()) + 2, m.group(1), m.group(2)) for m in found]


FENCES = [fence for page in PAGES for fence in _fences(page)]
RUN = [(page, line, code) for page, line, head, code in FENCES if head == "python"]
NOT_RUN = [(page, line, head, code) for page, line, head, code in FENCES if head.startswith("python ")]


def test_every_block_is_of_a_language_that_is_known_here() -> None:
    """A fence that is misspelt, such as "```py", would not be run and nobody would know."""
    assert {head.partition(" ")[0] for _, _, head, _ in FENCES} <= LANGUAGES


@pytest.mark.parametrize(("page", "line", "head", "code"), [pytest.param(*b, id=f"{b[0]}-{b[1]}") for b in NOT_RUN])
def test_a_block_that_is_not_run_says_why_and_is_python(page: str, line: int, head: str, code: str) -> None:
    assert re.fullmatch(r'python \{no-run="[^"]{10,}"\}', head), f"{page}, line {line - 1}: {head}"

    compile(code, f"{page}, from line {line}", "exec")


@pytest.mark.parametrize(("page", "line", "code"), [pytest.param(*b, id=f"{b[0]}-{b[1]}") for b in RUN])
def test_a_block_of_a_page_runs(page: str, line: int, code: str, tmp_path: Path) -> None:
    script = tmp_path / "block.py"
    script.write_text(code, encoding="utf-8")

    ran = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, timeout=120)

    assert ran.returncode == 0, f"{page}, line {line}:\n{ran.stdout}{ran.stderr}"


def test_the_api_reference_has_every_public_name() -> None:
    page = (ROOT / "docs/api-reference.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^::: skyward\.(?:integrations\.)?(\w+)$", page, re.MULTILINE))
    in_modules = {*vars(events), *vars(errors), "conc", "events", "errors", "integrations"}  # listed as modules
    aliases = {"lazy", "GPU", "Auto"}

    assert set(sky.__all__) - listed - in_modules - aliases == set()
    assert set(sky.integrations.__all__) <= listed
