"""What is imported when a session begins, and what to say where it is not there."""

from __future__ import annotations

import importlib
from typing import Any

from skyward.errors import SpecError


def load(package: str) -> Any:
    """Import a package.

    Raises
    ------
    SpecError
        It is not installed here; the message has the line that mends it.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as exc:
        if exc.name != package:
            raise
        raise SpecError(
            f"{package} is not installed where this call ran: add it, image=sky.Image(pip=[{package!r}])",
            option="image.pip",
            value=None,
            accepted=f"a list with {package!r}",
        ) from exc
