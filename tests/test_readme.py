"""Every Python block of README.md and of some pages in docs/ runs as a script of its own."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "docs/configuration.md")


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
