"""Every Python block of README.md runs as a script of its own."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"


def _blocks() -> list[tuple[int, str]]:
    text = README.read_text(encoding="utf-8")
    found = re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [(text.count("\n", 0, m.start()) + 2, m.group(1)) for m in found]


@pytest.mark.parametrize(("line", "code"), [pytest.param(*b, id=f"line-{b[0]}") for b in _blocks()])
def test_a_block_of_the_readme_runs(line: int, code: str, tmp_path: Path) -> None:
    script = tmp_path / "block.py"
    script.write_text(code, encoding="utf-8")

    ran = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, timeout=120)

    assert ran.returncode == 0, f"README.md, line {line}:\n{ran.stdout}{ran.stderr}"
