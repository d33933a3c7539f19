"""Defaults for pools that users set outside of their programs: in files and environment variables.

An argument comes before an environment variable, that before the project's file, that before the user's own, and all
of them before what is built in. Files are read when a pool is made, never at import. Knows no provider: names and
regions are checked where they are looked up.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from skyward.errors import SpecError, invalid
from skyward.spec.configurable import Configurable
from skyward.spec.pool import CHECKS, SELECTIONS, PoolSpec
from skyward.spec.validation import check_choice

PROJECT_FILE = "skyward.toml"
USER_FILE = "config.toml"
BUILT_IN = "built in"

_DEFAULTS = {option.name: option.default for option in fields(PoolSpec)}
_OPTIONS = (
    "selection", "allocation", "timeout", "idle_timeout", "boot_timeout", "heartbeat_timeout", "max_price", "max_cost",
    "retries", "display",
)  # fmt: skip
KEYS: Mapping[str, Any] = {
    "provider": "local",
    "region": None,
    **{option: _DEFAULTS[option] for option in _OPTIONS},
    "allocation": "spot-if-available",
}
"""The keys that can be set, and their built-in values."""


@dataclass(frozen=True, slots=True)
class Setting:
    """A value, and where it is from, in words."""

    value: Any
    source: str


@dataclass(frozen=True, slots=True)
class Settings:
    """What is configured at present; keys that are not set are left out."""

    found: Mapping[str, Setting] = field(default_factory=dict)

    def get(self, key: str) -> Any:
        """Return what is configured, else what is built in."""
        return self.found[key].value if key in self.found else KEYS[key]

    def source(self, key: str) -> str:
        """Return where the value of a key is from."""
        return self.found[key].source if key in self.found else BUILT_IN

    def fill(self, options: Mapping[str, Any]) -> tuple[dict[str, Any], set[str]]:
        """Return options with values for those that were not given, and which of them are configured."""
        filled, configured = dict(options), set()
        for name, value in options.items():
            if isinstance(value, Configurable):
                filled[name] = self.found[name].value if name in self.found else value.value
                configured |= {name} & set(self.found)
        return filled, configured

    @contextmanager
    def explaining(self, configured: set[str]) -> Iterator[None]:
        """Let an error about an option of `configured` say where its value is from."""
        try:
            yield
        except SpecError as exc:
            options = [getattr(e, "option", None) for e in getattr(exc, "errors", ()) or (exc,)]
            said = [f"{name} is from {self.source(name)}" for name in dict.fromkeys(options) if name in configured]
            if not said:
                raise
            raise SpecError("\n  ".join([str(exc), *said]), **exc.__dict__) from None


def load(folder: Path | None = None) -> Settings:
    """Read the configuration as it is seen from `folder`, or the current one.

    Raises
    ------
    SpecError
        A file can't be read, has a key that there is not, or a value that can't work. All such are told at once.
    """
    found: dict[str, Setting] = {}
    problems: list[SpecError] = []
    project = project_file(folder)
    for path in (user_file(), *([project] if project else [])):
        try:
            table = _read(path)
        except SpecError as exc:
            problems.append(exc)
            continue
        for key, value in (table or {}).items():
            _take(found, problems, key, value, f"{path}", f"{path}: {key}={value!r}")
    for key in KEYS:
        variable = f"SKYWARD_{key.upper()}"
        text = os.environ.get(variable, "").strip()
        if text:
            _take(found, problems, key, _from_text(key, text), variable, f"{variable}={text!r}")
    if len(problems) == 1:
        raise problems[0]
    if problems:
        lines = "\n  ".join(str(e) for e in problems)
        first: Any = problems[0]
        raise SpecError(
            f"{len(problems)} settings can't work:\n  {lines}",
            option=first.option, value=first.value, accepted=first.accepted, errors=tuple(problems),
        )  # fmt: skip
    return Settings(found)


def _take(
    found: dict[str, Setting], problems: list[SpecError], key: str, value: Any, source: str, shown: str
) -> None:
    try:
        found[key] = Setting(_check(key)(value), source)
    except ValueError as exc:
        accepted = getattr(exc, "accepted", None) or str(exc)
        problems.append(invalid(key, value, accepted, shown=shown))


# --- files --------------------------------------------------------------------------------------------------


def user_file() -> Path:
    """Return the path of the user's own file, whether or not it exists."""
    from skyward import paths

    return paths.config_folder() / USER_FILE


def project_file(folder: Path | None = None) -> Path | None:
    """Return the nearest ``skyward.toml``, or ``pyproject.toml`` with ``[tool.skyward]``, from `folder` upwards.

    Not beyond the repository: a folder with ``.git`` is the last that is looked at.
    """
    try:
        start = (folder or Path.cwd()).absolute()
    except FileNotFoundError:  # the current folder is gone
        return None
    for place in (start, *start.parents):
        own, shared = place / PROJECT_FILE, place / "pyproject.toml"
        if own.is_file():
            return own
        if shared.is_file() and _has_table(shared):
            return shared
        if (place / ".git").exists():
            return None
    return None


def _has_table(pyproject: Path) -> bool:
    """Tell whether a file has a table for us. One without the word is not read as TOML: it is for other tools."""
    try:
        return b"skyward" in pyproject.read_bytes() and _read(pyproject) is not None
    except (OSError, SpecError):
        return True  # told when it is read


def _read(path: Path) -> dict[str, Any] | None:
    """Return what a file has for us; None when it is not there, or has nothing."""
    import tomllib

    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as exc:  # what is no TOML, or no text
        why = getattr(exc, "strerror", None) or str(exc)
        raise _file_error(path, f"{path} can't be read: {why}") from exc
    if path.name != "pyproject.toml":
        return data
    tool = data.get("tool")
    table = tool.get("skyward") if isinstance(tool, dict) else None
    if table is not None and not isinstance(table, dict):
        raise _file_error(path, f"{path}: tool.skyward is not a table")
    return table


def _file_error(path: Path, text: str) -> SpecError:
    return SpecError(text, option=None, value=str(path), accepted="a TOML file")


# --- values -------------------------------------------------------------------------------------------------


def _check(key: str) -> Callable[[Any], Any]:
    """Return the check of a key's value, which raises `ValueError` with what is accepted."""
    own: Mapping[str, Callable[[Any], Any]] = {
        "provider": _check_provider,
        "region": _check_region,
        "selection": check_choice(SELECTIONS),  # a file has no functions
        "allocation": _check_allocation,
    }
    return own.get(key) or (CHECKS[key] if key in KEYS else _unknown(key))


def _unknown(key: str) -> Callable[[Any], Any]:
    def refuse(_: Any) -> Any:
        near = difflib.get_close_matches(key.lower(), KEYS, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"one of the keys {', '.join(KEYS)}{hint}")

    return refuse


def _check_provider(value: Any) -> str | list[str]:
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, Sequence) or not names or not all(isinstance(n, str) and n.strip() for n in names):
        raise ValueError("a provider's name such as 'aws', or a list of them")
    return value if isinstance(value, str) else list(names)


def _check_region(value: Any) -> str | dict[str, str]:
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, Mapping) and value and all(isinstance(v, str) and v.strip() for v in value.values()):
        return {str(provider).lower(): region for provider, region in value.items()}
    raise ValueError("a region such as 'us-east-1', or a table with one for each provider: { aws = 'us-east-1' }")


def _check_allocation(value: Any) -> str | float:
    from skyward.spec.allocation import Allocation

    Allocation.parse(value)
    found: str | float = value
    return found


_NUMBERS: Mapping[str, Callable[[str], float]] = {
    "timeout": float, "idle_timeout": float, "boot_timeout": float, "heartbeat_timeout": float, "max_price": float,
    "max_cost": float, "allocation": float, "retries": int,
}  # fmt: skip


def _from_text(key: str, text: str) -> Any:
    """Return what the text of an environment variable means; itself where it means nothing."""
    if key == "provider" and "," in text:
        return [name.strip() for name in text.split(",") if name.strip()]
    try:
        return _NUMBERS[key](text) if key in _NUMBERS else text
    except ValueError:
        return text
