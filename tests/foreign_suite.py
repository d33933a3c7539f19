"""Run another project's own tests on skyward, in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run_foreign_suite(*modules: str, plugin: Path, cwd: Path) -> str:
    """Run the tests of installed `modules` with a pytest plugin; return the output, fail with it."""
    # Dask's nannies set thread limits for the whole process that they are started in, which tests here do.
    clean = {k: v for k, v in os.environ.items() if not k.endswith("_NUM_THREADS")}
    paths = [str(plugin.parent), str(ROOT), str(ROOT / "backends")]
    options = ["-p", plugin.stem, "-p", "no:cacheprovider", "-q", "--timeout=120", "--tb=short"]
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "--pyargs", *modules, *options],
        cwd=cwd,  # away from this project's pytest settings
        env={**clean, "PYTHONPATH": os.pathsep.join(paths), "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout[-20_000:] + ran.stderr[-5_000:]
    return ran.stdout
