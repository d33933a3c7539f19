"""What the environment on a machine has to hold so that it fits the caller's: pins, constraints, skyward itself."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterable, Iterator, Sequence

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from skyward.environment.found import hidden, requirements_of
from skyward.environment.wheels import Wheel
from skyward.scripts.bootstrap import Recipe
from skyward.spec.image import Image
from skyward.spec.validation import Problems

_BOTH_SIDES = ("dask", "distributed", "cloudpickle", "tornado", "msgpack")
"""What has to be the same version on both sides for pickles and messages to be understood."""


def recipe(image: Image, wheel: Wheel, *, nvidia: bool = False) -> Recipe:
    """Return the environment for `image`: what is named without a version and installed here gets the version here.

    So does everything that the requirements need in turn, as a constraint. What is installed from a folder or a
    repository is left to the index: its version need not be known there. With `nvidia` it can ask NVIDIA's driver.

    Raises
    ------
    SpecError
        The image asks for another version of what has to be the same on both sides.
    """
    local = [text for wheel in image.wheels for text in wheel.requirements if (r := parsed(text)) and _applies(r, "")]
    asked = list(_without_skyward([*image.pip, *filter(_is_skyward, local)]))
    _check_both_sides(asked)
    requirements = [*(f"{n}=={v}" for n in _BOTH_SIDES if (v := _version(n))), *wheel.requirements]
    if nvidia:
        asked += _without_skyward(["skyward[gpu]"])
    requirements += map(_pinned, asked)
    names = [*filter(None, map(parsed, [*wheel.requirements, *local, *asked]))]
    pins = sorted({f"{name}=={version}" for name, version in _closure(names)})
    constraints = [*_without_conflicts(pins, [*asked, *image.constraints]), *image.constraints]
    return Recipe(
        python=image.python or ".".join(platform.python_version_tuple()[:2]),
        requirements=tuple(dict.fromkeys(requirements)),
        constraints=tuple(dict.fromkeys(constraints)),
        wheel=wheel.name,
        extra_index_url=" ".join(image.indexes) or None,
        apt=tuple(image.apt),
        local=tuple(map(path_of, image.wheels)),
    )


def described(environment: Recipe) -> tuple[str, ...]:
    """Return the packages of a recipe to show to a user: without hashes, credentials and folders."""
    return (*map(hidden, environment.requirements), *(path.rpartition("/")[2] for path in environment.local))


def path_of(local: Wheel) -> str:
    """Return where a local package lies among the wheels on a machine."""
    return f"{local.digest}/{local.name}"


def _without_skyward(asked: Sequence[str]) -> Iterator[str]:
    """Put what the extras of skyward need in the place of skyward itself, which travels as a wheel."""
    for text in asked:
        if not _is_skyward(text):
            yield text
            continue
        for extra in Requirement(text).extras:
            yield from _without_skyward([*requirements_of(importlib.metadata.requires("skyward") or (), extra)])


def _is_skyward(text: str) -> bool:
    requirement = parsed(text)
    return requirement is not None and canonicalize_name(requirement.name) == "skyward"


def _check_both_sides(asked: Sequence[str]) -> None:
    problems = Problems("Image")
    for text in asked:
        requirement = parsed(text)
        name = canonicalize_name(requirement.name) if requirement else ""
        if requirement is None or name not in _BOTH_SIDES or not _applies(requirement, ""):
            continue
        here = _version(name)
        if here is not None and not requirement.specifier.contains(here, prereleases=True):
            problems.note("pip", str(requirement), f"{name}=={here}, as it is installed here: both sides need the same")
    problems.raise_if_any()


def _applies(requirement: Requirement, extra: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def parsed(text: str) -> Requirement | None:
    """Return a requirement without its hashes; None for a path or a URL, of which the installer decides."""
    try:
        return Requirement(text.partition(" --hash=")[0])
    except InvalidRequirement:
        return None


def _version(name: str) -> str | None:
    """Return the version that is installed here, without a local label such as ``+cpu``.

    None: there is none, or it comes from a folder or a repository.
    """
    try:
        found = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return None
    # conda's builds note a folder of the computer that made them.
    is_local = found.read_text("direct_url.json") and (found.read_text("INSTALLER") or "").strip() != "conda"
    return None if is_local else found.version.partition("+")[0]


def _pinned(text: str) -> str:
    requirement = parsed(text)
    if requirement is None or requirement.url or requirement.specifier:
        return text
    version = _version(requirement.name)
    if version is None:
        return text
    extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
    marker = f" ; {requirement.marker}" if requirement.marker else ""
    return f"{requirement.name}{extras}=={version}{marker}"


def _closure(requirements: Sequence[Requirement]) -> Iterator[tuple[str, str]]:
    """Yield (name, version here) of what the requirements need, and what that needs in turn."""
    seen: set[tuple[str, str]] = set()
    todo = [(requirement, "") for requirement in requirements]
    while todo:
        requirement, extra = todo.pop()
        if not _applies(requirement, extra):
            continue
        try:
            found = importlib.metadata.distribution(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if not requirement.url and (version := _version(requirement.name)):
            yield canonicalize_name(requirement.name), version
        for wanted in ("", *requirement.extras):
            if (key := (canonicalize_name(requirement.name), wanted)) not in seen:
                seen.add(key)
                todo += [(Requirement(text), wanted) for text in found.requires or ()]


def _without_conflicts(constraints: Iterable[str], asked: Sequence[str]) -> Iterator[str]:
    """Leave out what contradicts a version that the user asked for."""
    own: dict[str, SpecifierSet] = {}
    for requirement in filter(None, map(parsed, asked)):
        key = canonicalize_name(requirement.name)
        own[key] = own.get(key, SpecifierSet()) & requirement.specifier
    for constraint in constraints:
        name, _, version = constraint.partition("==")
        specifier = own.get(canonicalize_name(name))
        if specifier is None or specifier.contains(version, prereleases=True):
            yield constraint
