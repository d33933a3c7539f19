"""The files in examples/, and which of them need frameworks that not every environment has."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))
NEEDS = {
    "10_pytorch_distributed": ["torch"],
    "11_keras_training": ["keras", "jax"],
    "12_huggingface_finetuning": ["torch", "transformers"],
}


def run(path: Path, folder: Path, *options: str) -> str:
    """Run an example as it is, with options if given, and return what it printed."""
    ran = subprocess.run([sys.executable, path, *options], cwd=folder, capture_output=True, text=True, timeout=170)

    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "Traceback" not in ran.stderr
    return ran.stdout
