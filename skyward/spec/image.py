"""The environment that a pool's machines get: packages, variables, files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from skyward.spec.validation import (
    Problems,
    check_apt,
    check_count,
    check_env,
    check_index_urls,
    check_modules,
    check_pip,
    check_python,
    check_strings,
)

if TYPE_CHECKING:
    from skyward.environment.wheels import Wheel


@dataclass(frozen=True, slots=True)
class Image:
    """The environment of a pool's machines. `Image.from_here` makes the one that you have.

    Parameters
    ----------
    python
        Version such as ``"3.12"``; None: the caller's.
    pip
        Requirements, as pip takes them: ``["numpy", "torch>=2.2"]``, also with ``--hash=``.
    pip_extra_index_url
        An additional package index with priority, or several: a package comes from it if it has a suitable version,
        and from the default index otherwise. With ``UV_INDEX_STRATEGY=first-index`` in the environment of the machine's
        user, a package that it has in any version comes only from it.
    apt
        Debian packages.
    env
        Environment variables of the workers. Their values are kept out of `repr`.
    include
        Files and folders to copy to the working directory of the workers.
    preload
        Modules that each machine imports once, before its worker processes are forked: these start with the modules
        loaded and share their memory. A module must be installed on the machines, or be in `include`. One that can't be
        imported, or initialises CUDA when it is imported, makes the start of the pool fail with `BootstrapError`.
    constraints
        Versions of packages that are installed only if others need them, as in pip's constraints files.
    wheels
        Local packages; `from_here` makes them.
    not_reproduced
        Packages of the environment here that machines don't get, or get differently, each with the reason; `from_here`
        fills it.

    Raises
    ------
    SpecError
        A value is invalid, or contains characters that a shell could run.
    """

    python: str | None = None
    pip: Sequence[str] = ()
    pip_extra_index_url: str | Sequence[str] | None = None
    apt: Sequence[str] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    include: Sequence[str] = ()
    preload: Sequence[str] = ()
    constraints: Sequence[str] = ()
    wheels: Sequence[Wheel] = ()
    not_reproduced: Mapping[str, str] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        problems = Problems("Image")
        problems.check("python", self.python, check_python)
        pip = problems.check("pip", self.pip, check_pip)
        indexes = problems.check("pip_extra_index_url", self.pip_extra_index_url, check_index_urls, secret=True)
        apt = problems.check("apt", self.apt, check_apt)
        env = problems.check("env", self.env, check_env, secret=True)
        include = problems.check("include", self.include, _check_include)
        preload = problems.check("preload", self.preload, check_modules)
        constraints = problems.check("constraints", self.constraints, check_pip)
        wheels = problems.check("wheels", self.wheels, _check_wheels) if self.wheels else ()
        missing = problems.check("not_reproduced", self.not_reproduced, _check_reasons)
        problems.raise_if_any()
        object.__setattr__(self, "pip", pip)
        object.__setattr__(self, "apt", apt)
        object.__setattr__(self, "env", env)
        object.__setattr__(self, "include", include)
        object.__setattr__(self, "preload", preload)
        object.__setattr__(self, "pip_extra_index_url", indexes)
        object.__setattr__(self, "constraints", constraints)
        object.__setattr__(self, "wheels", wheels)
        object.__setattr__(self, "not_reproduced", missing)

    @classmethod
    def from_here(
        cls,
        *,
        exclude: Sequence[str] = (),
        pip: Sequence[str] = (),
        pip_extra_index_url: str | Sequence[str] | None = None,
        apt: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        include: Sequence[str] = (),
        preload: Sequence[str] = (),
    ) -> Image:
        """Return the image of the environment that this program runs in.

        It has what the nearest ``uv.lock`` or ``requirements.txt`` names, from the folder of the running script (in a
        notebook: the working directory) up to the root of its project. Without one, it has what is installed. Local and
        editable packages become wheels; uv or pip builds them here. What machines don't get as it is here is logged and
        in `not_reproduced`.

        Parameters
        ----------
        exclude
            Names of packages to leave out. A package that another one needs is installed nevertheless.
        pip
            Further requirements. One for a package of this environment replaces it.
        pip_extra_index_url
            Package indexes in front of those that the environment here names.
        apt, env, include, preload
            As of `Image`.

        Raises
        ------
        SpecError
            A value is invalid, or a lock file or requirements file can't be read.

        Examples
        --------
        >>> image = sky.Image.from_here(exclude=["jupyter"])  # doctest: +SKIP
        >>> with sky.ComputePool(sky.AWS(), image=image) as pool:  # doctest: +SKIP
        ...     train() >> pool
        """
        from skyward.environment.here import read_here

        problems = Problems("Image.from_here")
        names = problems.check("exclude", exclude, check_strings)
        pip = problems.check("pip", pip, check_pip)
        given = problems.check("pip_extra_index_url", pip_extra_index_url, check_index_urls, secret=True)
        problems.raise_if_any()
        found = read_here({_plain(name) for name in names}, {_name(text) for text in pip})
        indexes = dict.fromkeys([*([given] if isinstance(given, str) else given or ()), *found.indexes])
        return cls(
            pip=[*found.pip, *pip], pip_extra_index_url=tuple(indexes) or None, apt=apt,
            env={} if env is None else env, include=include, preload=preload,
            constraints=found.constraints, wheels=tuple(found.wheels.values()), not_reproduced=found.not_reproduced,
        )  # fmt: skip

    @property
    def indexes(self) -> tuple[str, ...]:
        """The package indexes of `pip_extra_index_url`."""
        given = self.pip_extra_index_url
        return (given,) if isinstance(given, str) else tuple(given or ())

    def content_hash(self) -> str:
        """Return 12 hex digits that are equal for images with the same content, in whatever order it is listed.

        `preload` doesn't count: it changes nothing that is installed.
        """
        import hashlib  # here, because loading it takes as long as all of this module

        parts = [
            self.python or "",
            "\n".join(sorted(map(_plain, self.pip))),
            " ".join(self.indexes),
            "\n".join(sorted(self.apt)),
            "\n".join(f"{k}={v}" for k, v in sorted(self.env.items())),
            "\n".join(sorted(self.include)),
        ]
        if self.constraints or self.wheels:
            digests = (wheel.digest for wheel in self.wheels)
            parts += ["\n".join(sorted(map(_plain, self.constraints))), "\n".join(sorted(digests))]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]

    def bootstrap(self, ttl: int = 0) -> str:
        """Return the script that prepares a machine for this image: POSIX sh, which may run repeatedly.

        A pool runs its own script, which also pins packages to the caller's versions.

        Parameters
        ----------
        ttl
            Seconds after which the machine switches itself off; 0: never. With a limit, the script also stops Debian's
            timers for upgrades.

        Raises
        ------
        SpecError
            `ttl` is invalid, or the image has local packages: a script carries no files.
        """
        import sys

        from skyward.scripts.bootstrap import image_recipe, script

        problems = Problems()
        problems.check("ttl", ttl, check_count(0))
        if self.wheels:
            problems.note("wheels", [wheel.name for wheel in self.wheels], "() for a script, which carries no files")
        problems.raise_if_any()
        recipe = image_recipe(self, f"{sys.version_info[0]}.{sys.version_info[1]}")
        return script(recipe, ttl_s=ttl, outlives_pool=not ttl)

    def __hash__(self) -> int:
        return hash(self.content_hash())

    def __reduce__(self) -> Any:
        values = [getattr(self, f.name) for f in fields(self)]
        return Image, tuple(dict(value) if isinstance(value, MappingProxyType) else value for value in values)

    def __repr__(self) -> str:
        shown = {
            "python": self.python, "pip": self.pip, "apt": self.apt, "env": sorted(self.env), "include": self.include,
            "preload": self.preload, "constraints": self.constraints, "wheels": [wheel.name for wheel in self.wheels],
            "not_reproduced": dict(self.not_reproduced),
        }  # fmt: skip
        return f"Image({', '.join(f'{k}={v!r}' for k, v in shown.items() if v)})"


def _plain(requirement: str) -> str:
    """Return a requirement without spaces, its name as package indexes compare names (PEP 503)."""
    import re

    name, rest = re.fullmatch(r"([A-Za-z0-9._-]*)(.*)", "".join(requirement.split())).groups()  # type: ignore[union-attr]
    return re.sub(r"[-_.]+", "-", name).lower() + rest


def _name(requirement: str) -> str:
    """Return the name in a requirement, as package indexes compare names."""
    import re

    return _plain(re.match(r"[A-Za-z0-9._-]*", requirement)[0])  # type: ignore[index]  # it matches the empty text


def _check_wheels(value: Any) -> tuple[Wheel, ...]:
    import re

    from skyward.environment.wheels import Wheel

    if not isinstance(value, (list, tuple)) or not all(isinstance(wheel, Wheel) for wheel in value):
        raise ValueError("the wheels of another image")
    for wheel in value:
        if not re.fullmatch(r"[A-Za-z0-9._+!-]+\.whl", wheel.name):
            raise ValueError(f"names of wheels, which {wheel.name!r} is not")
    return tuple(value)


def _check_reasons(value: Any) -> Mapping[str, str]:
    if not isinstance(value, Mapping) or not all(isinstance(text, str) for pair in value.items() for text in pair):
        raise ValueError("a mapping of names to reasons")
    return MappingProxyType(dict(value))


def _check_include(value: Any) -> tuple[str, ...]:
    paths = check_strings(value)
    for path in paths:
        if not path.strip() or not path.isprintable() or path.startswith("-"):
            raise ValueError(f"paths of files and folders, which {path!r} is not")
    return paths
