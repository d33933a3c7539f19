"""The environment that a pool's machines get: packages, variables, files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from skyward.spec.validation import (
    Problems,
    check_apt,
    check_count,
    check_env,
    check_index_url,
    check_pip,
    check_python,
    check_strings,
)


@dataclass(frozen=True, slots=True)
class Image:
    """The environment of a pool's machines.

    Parameters
    ----------
    python
        Version such as ``"3.12"``; None: the caller's.
    pip
        Requirements, as pip takes them: ``["numpy", "torch>=2.2"]``.
    pip_extra_index_url
        An additional package index with priority: a package comes from it if it has a suitable version, and from the
        default index otherwise. With ``UV_INDEX_STRATEGY=first-index`` in the environment of the machine's user, a
        package that it has in any version comes only from it.
    apt
        Debian packages.
    env
        Environment variables of the workers. Their values are kept out of `repr`.
    include
        Files and folders to copy to the working directory of the workers.

    Raises
    ------
    SpecError
        A value is invalid, or contains characters that a shell could run.
    """

    python: str | None = None
    pip: Sequence[str] = ()
    pip_extra_index_url: str | None = None
    apt: Sequence[str] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    include: Sequence[str] = ()

    def __post_init__(self) -> None:
        problems = Problems("Image")
        problems.check("python", self.python, check_python)
        pip = problems.check("pip", self.pip, check_pip)
        problems.check("pip_extra_index_url", self.pip_extra_index_url, check_index_url, secret=True)
        apt = problems.check("apt", self.apt, check_apt)
        env = problems.check("env", self.env, check_env, secret=True)
        include = problems.check("include", self.include, _check_include)
        problems.raise_if_any()
        object.__setattr__(self, "pip", pip)
        object.__setattr__(self, "apt", apt)
        object.__setattr__(self, "env", env)
        object.__setattr__(self, "include", include)

    def content_hash(self) -> str:
        """Return 12 hex digits that are equal for images with the same content, in whatever order it is listed."""
        import hashlib  # here, because loading it takes as long as all of this module

        parts = [
            self.python or "",
            "\n".join(sorted(map(_plain, self.pip))),
            self.pip_extra_index_url or "",
            "\n".join(sorted(self.apt)),
            "\n".join(f"{k}={v}" for k, v in sorted(self.env.items())),
            "\n".join(sorted(self.include)),
        ]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]

    def bootstrap(self, ttl: int = 0) -> str:
        """Return the script that prepares a machine for this image: POSIX sh, which may run repeatedly.

        A pool runs its own script, which also pins packages to the caller's versions.

        Parameters
        ----------
        ttl
            Seconds after which the machine switches itself off; 0: never. With a limit, the script also stops Debian's
            timers for upgrades.
        """
        import sys

        from skyward.scripts.bootstrap import image_recipe, script

        problems = Problems()
        problems.check("ttl", ttl, check_count(0))
        problems.raise_if_any()
        recipe = image_recipe(self, f"{sys.version_info[0]}.{sys.version_info[1]}")
        return script(recipe, ttl_s=ttl, outlives_pool=not ttl)

    def __hash__(self) -> int:
        return hash(self.content_hash())

    def __reduce__(self) -> Any:
        return Image, (self.python, self.pip, self.pip_extra_index_url, self.apt, dict(self.env), self.include)

    def __repr__(self) -> str:
        shown = {
            "python": self.python, "pip": self.pip, "apt": self.apt, "env": sorted(self.env), "include": self.include
        }  # fmt: skip
        return f"Image({', '.join(f'{k}={v!r}' for k, v in shown.items() if v)})"


def _plain(requirement: str) -> str:
    """Return a requirement without spaces, its name as package indexes compare names (PEP 503)."""
    import re

    name, rest = re.fullmatch(r"([A-Za-z0-9._-]*)(.*)", "".join(requirement.split())).groups()  # type: ignore[union-attr]
    return re.sub(r"[-_.]+", "-", name).lower() + rest


def _check_include(value: Any) -> tuple[str, ...]:
    paths = check_strings(value)
    for path in paths:
        if not path.strip() or not path.isprintable() or path.startswith("-"):
            raise ValueError(f"paths of files and folders, which {path!r} is not")
    return paths
