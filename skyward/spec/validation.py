"""Checks of single options, and the error that tells of all bad ones at once. Imports only errors.

A check takes a value and returns it in the form that is used from then on; it raises `ValueError` with what would
be accepted, in words that follow "expected".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from skyward.errors import SpecError, invalid

Check = Callable[[Any], Any]


class Problems:
    """Collects what is wrong with the options of one thing, named `what` in messages."""

    def __init__(self, what: str = "") -> None:
        self._what = what
        self._errors: list[SpecError] = []

    def check(self, option: str, value: Any, check: Check, *, optional: bool = False, secret: bool = False) -> Any:
        """Return what `check` makes of `value`; note the problem and return None when it fails.

        With `secret` the message leaves the value out.
        """
        if value is None and optional:
            return None
        try:
            return check(value)
        except SpecError as exc:  # from a value that checks itself, such as an accelerator's name
            self._errors.append(exc)
        except ValueError as exc:
            shown = f"{option}={'...' if secret else repr(value)}"
            where = f"{self._what}({shown})" if self._what else shown
            self._errors.append(invalid(option, value, str(exc), shown=where))
        return None

    def note(self, option: str, value: Any, accepted: str) -> None:
        """Note a problem that was found elsewhere."""
        self._errors.append(invalid(option, value, accepted))

    def raise_if_any(self) -> None:
        """Raise the problem, or one error for all of them."""
        if len(self._errors) == 1:
            raise self._errors[0]
        if self._errors:
            lines = "\n  ".join(str(e) for e in self._errors)
            first: Any = self._errors[0]
            raise SpecError(
                f"{len(self._errors)} options can't work:\n  {lines}",
                option=first.option,
                value=first.value,
                accepted=first.accepted,
                errors=tuple(self._errors),
            )


# --- numbers ------------------------------------------------------------------------------------------------


def check_count(least: int) -> Check:
    def check(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"an integer >= {least}")
        return value

    return check


def check_positive(unit: str) -> Check:
    def check(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise ValueError(f"{unit} greater than 0")
        return value

    return check


def check_seconds(least: float) -> Check:
    def check(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value < math.inf:
            raise ValueError(f"seconds from {least:g}")
        return value

    return check


def check_allocation_share(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ValueError("a share from 0 to 1")
    return float(value)


def check_bool(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("True or False")
    return value


_UNITS = {
    "": 1, "M": 1, "MB": 1, "G": 1000, "GB": 1000, "T": 10**6, "TB": 10**6,
    "MIB": 1.048576, "GIB": 1073.741824, "TIB": 1099511.627776,
}  # fmt: skip


def parse_memory(value: Any) -> int:
    """Return an amount of memory in MB (10⁶ bytes): ``"32GB"``, ``"32GiB"``, ``"500 MB"``, or MB as a number.

    Raises
    ------
    ValueError
        None of these, or nothing at all.
    """
    import re

    accepted = "MB as a whole number, or a text such as '32GB' or '32GiB'"
    if isinstance(value, int) and not isinstance(value, bool):
        megabytes: float = value
    elif isinstance(value, str) and (match := re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", value)):
        unit = match[2].upper()
        if unit not in _UNITS:
            raise ValueError(accepted)
        megabytes = float(match[1]) * _UNITS[unit]
    else:
        raise ValueError(accepted)
    if megabytes < 1:
        raise ValueError(accepted)
    return math.ceil(megabytes)


# --- texts --------------------------------------------------------------------------------------------------


def check_text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError("a text that is not empty")
    return value


def check_choice(accepted: Sequence[str], otherwise: str = "") -> Check:
    """Return a check for one of `accepted`; `otherwise` says what else there is."""

    def check(value: Any) -> str:
        if isinstance(value, str) and value in accepted:
            return str(value)
        words = ", ".join(repr(a) for a in accepted)
        raise ValueError(f"{words}{f' or {otherwise}' if otherwise else ''}{_near(value, accepted)}")

    return check


def check_selection(accepted: Sequence[str]) -> Check:
    by_name = check_choice(accepted, "a function (providers, spec) -> provider")
    return lambda value: value if callable(value) else by_name(value)


def _near(value: Any, accepted: Sequence[str]) -> str:
    import difflib

    if not isinstance(value, str):
        return ""
    lowered = {a.lower(): a for a in accepted}
    near = difflib.get_close_matches(value.lower(), lowered, n=1, cutoff=0.5)
    return f"; did you mean {lowered[near[0]]!r}?" if near else ""


def check_callback(value: Any) -> Any:
    if not callable(value):
        raise ValueError("a function that takes an event")
    return value


def check_strings(value: Any) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence) or not all(isinstance(v, str) for v in value):
        example = f"[{value!r}]" if isinstance(value, str) else "['a', 'b']"
        raise ValueError(f"a list of texts such as {example}")
    return tuple(value)


def check_modules(value: Any) -> tuple[str, ...]:
    from keyword import iskeyword

    names = check_strings(value)
    for name in names:
        if not all(part.isidentifier() and not iskeyword(part) for part in name.split(".")):
            raise ValueError(f"names of modules such as 'sklearn.ensemble', which {name!r} is not")
    return names


def check_env(value: Any) -> Mapping[str, str]:
    import re

    if not isinstance(value, Mapping):
        raise ValueError("a mapping of names to texts")
    for name, text in value.items():
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise ValueError(f"names of variables made of letters, digits and _, not {name!r}")
        if not isinstance(text, str) or "\0" in text or "\n" in text:
            raise ValueError(f"a text of one line as the value of {name}")
    return MappingProxyType(dict(value))


# --- what reaches a shell on a machine ----------------------------------------------------------------------


def check_python(value: Any) -> str | None:
    import re

    if value is not None and not (isinstance(value, str) and re.fullmatch(r"3\.[0-9]{1,2}(\.[0-9]{1,3})?", value)):
        raise ValueError("a version such as '3.12', or None for the caller's")
    return value


# Requirements as PEP 508 has them. What a shell would act on stands only where the grammar wants it: `;` before a
# marker, quotes around its values, `<` and `>` before a version, `&` inside an address.
_NAME = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?"
_EXTRAS = rf"(?: *\[ *(?:{_NAME}(?: *, *{_NAME})*)? *\])?"
_VERSION = r"(?:===|==|~=|!=|<=|>=|<|>) *[A-Za-z0-9.*+!_-]+"
_VERSIONS = rf"{_VERSION}(?: *, *{_VERSION})*,?"
_ADDRESS = r"@ *[A-Za-z+]+://[A-Za-z0-9._~:/?#@+,=%&\[\]-]+"
_VALUE = r"(?:[a-z_.]+|'[A-Za-z0-9 ._,+!*-]*'|\"[A-Za-z0-9 ._,+!*-]*\")"
# Words stand between spaces, so that there is one way only to read a text: no text takes long to refuse.
_TEST = rf"[( ]*{_VALUE}(?: *(?:===|==|~=|!=|<=|>=|<|>) *| +(?:not +)?in +){_VALUE}(?: *\))*"
_MARKER = rf"(?: *;{_TEST}(?: +(?:and|or) {_TEST})*)?"
_HASHES = r"(?: +--hash=sha(?:256|384|512):[0-9a-f]{64,128})*"
_REQUIREMENT = rf"{_NAME}{_EXTRAS} *(?:{_VERSIONS}|\( *{_VERSIONS} *\)|{_ADDRESS})?{_MARKER}{_HASHES} *"


def check_pip(value: Any) -> tuple[str, ...]:
    import re

    requirements = check_strings(value)
    for text in requirements:
        if not re.fullmatch(_REQUIREMENT, text):
            raise ValueError(f"requirements in pip's format, which {text!r} is not")
    return requirements


def check_apt(value: Any) -> tuple[str, ...]:
    import re

    packages = check_strings(value)
    for text in packages:
        # Debian Policy Manual, 5.6.7: what a package's name may hold; and a version after =.
        if not re.fullmatch(r"[a-z0-9][a-z0-9+.\-]+(=[A-Za-z0-9.+~:\-]+)?", text):
            raise ValueError(f"names of Debian packages, which {text!r} is not")
    return packages


def check_index_url(value: Any) -> str | None:
    import re

    pattern = r"https?://[A-Za-z0-9._~:/?#@+,=%\[\]-]+"
    if value is not None and not (isinstance(value, str) and re.fullmatch(pattern, value)):
        raise ValueError("a URL that begins with https:// or http://")
    return value


def check_index_urls(value: Any) -> str | tuple[str, ...] | None:
    """Check one URL, or several, all with priority over the default index and in this order."""
    if isinstance(value, (list, tuple)):
        return tuple(str(check_index_url(url if url is not None else "")) for url in value)
    return check_index_url(value)
