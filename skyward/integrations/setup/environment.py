"""Environment variables for the time of a session, and what to say of a package that is not there."""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

from skyward.errors import SpecError


@contextlib.contextmanager
def variables(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables, and put back what was there before."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


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
