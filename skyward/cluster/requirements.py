"""What the environment on a machine has to hold so that it fits the caller's: pins, constraints, skyward itself."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterable, Iterator, Sequence

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from skyward.bootstrap import Recipe
from skyward.cluster.wheel import Wheel
from skyward.spec import Image

_BOTH_SIDES = ("dask", "distributed", "cloudpickle", "tornado", "msgpack")
"""What has to be the same version on both sides for pickles and messages to be understood."""


def recipe(image: Image, wheel: Wheel) -> Recipe:
    """Return the environment for `image`: what is named without a version and installed here gets the version here.

    So does everything that the requirements need in turn, as a constraint.
    """
    requirements = [*(f"{n}=={v}" for n in _BOTH_SIDES if (v := _version(n))), *wheel.requirements]
    requirements += map(_pinned, image.pip)
    names = [*wheel.requirements, *(r for r in image.pip if _parsed(r))]
    constraints = sorted({f"{name}=={version}" for name, version in _closure(names)})
    return Recipe(
        python=image.python or ".".join(platform.python_version_tuple()[:2]),
        requirements=tuple(dict.fromkeys(requirements)),
        constraints=tuple(_without_conflicts(constraints, image.pip)),
        wheel=wheel.name,
        extra_index_url=image.pip_extra_index_url,
        apt=tuple(image.apt),
    )


def _parsed(text: str) -> Requirement | None:
    try:
        return Requirement(text)
    except InvalidRequirement:  # a path or URL: the installer decides
        return None


def _version(name: str) -> str | None:
    """Return the version that is installed here, without a local label such as ``+cpu``; None when there is none."""
    try:
        return importlib.metadata.version(name).partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return None


def _pinned(text: str) -> str:
    requirement = _parsed(text)
    if requirement is None or requirement.url or requirement.specifier:
        return text
    version = _version(requirement.name)
    if version is None:
        return text
    extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
    marker = f" ; {requirement.marker}" if requirement.marker else ""
    return f"{requirement.name}{extras}=={version}{marker}"


def _closure(requirements: list[str]) -> Iterator[tuple[str, str]]:
    """Yield (name, version here) of what the requirements need, and what that needs in turn."""
    seen: set[tuple[str, str]] = set()
    todo = [(Requirement(text), "") for text in requirements]
    while todo:
        requirement, extra = todo.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        try:
            found = importlib.metadata.distribution(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if not requirement.url:
            yield canonicalize_name(requirement.name), found.version.partition("+")[0]
        for wanted in ("", *requirement.extras):
            if (key := (canonicalize_name(requirement.name), wanted)) not in seen:
                seen.add(key)
                todo += [(Requirement(text), wanted) for text in found.requires or ()]


def _without_conflicts(constraints: Iterable[str], asked: Sequence[str]) -> Iterator[str]:
    """Leave out what contradicts a version that the user asked for."""
    own = {canonicalize_name(r.name): r.specifier for text in asked if (r := _parsed(text))}
    for constraint in constraints:
        name, _, version = constraint.partition("==")
        specifier = own.get(canonicalize_name(name))
        if specifier is None or specifier.contains(version, prereleases=True):
            yield constraint
