"""Every Python block of README.md and docs/ runs as a script of its own, but for those that need machines: `no-run`."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import skyward as sky
from skyward import errors, events

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))]


def _blocks(page: str) -> list[tuple[str, int, str]]:
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [(page, text.count("\n", 0, m.start()) + 2, m.group(1)) for m in found]


@pytest.mark.parametrize(
    ("page", "line", "code"), [pytest.param(*b, id=f"{b[0]}-{b[1]}") for page in PAGES for b in _blocks(page)]
)
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
