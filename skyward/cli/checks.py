"""What `skyward doctor` looks at: each check says what was found, and what to do where that is not as it should be."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from packaging.requirements import Requirement

from skyward import config, paths, providers
from skyward.cleanup import journal
from skyward.console.model import counted
from skyward.errors import CredentialsError, ProviderError, SpecError
from skyward.providers.base import Cloud
from skyward.version import __version__

_SHOWN = ("dask", "distributed", "cloudpickle", "joblib", "asyncssh")
_OWN_EXTRAS = ("all", "bench", "docs", "test")  # for those who develop skyward
_SSH_S = 10.0


@dataclass(frozen=True, slots=True)
class Check:
    """What was found of one thing.

    Attributes
    ----------
    status
        ``"ok"``; ``"unused"``: it is not there, and nothing here needs it; ``"note"``: it works, with less;
        ``"problem"``: it is configured and does not work.
    advice
        What to do.
    """

    topic: str
    name: str
    status: Literal["ok", "unused", "note", "problem"]
    says: str
    advice: str = ""

    def facts(self) -> dict[str, Any]:
        return asdict(self)


def all_checks() -> list[Check]:
    """Return all checks, made now. Asks clouds, and blocks until they have answered."""
    settings, configuration = _configuration()
    return [*_versions(), *configuration, *_accounts(settings), *_ssh(), *_record()]


# --- versions -----------------------------------------------------------------------------------------------


def _versions() -> Iterator[Check]:
    yield Check("versions", "skyward", "ok", f"{__version__} in {Path(providers.__file__).parent.parent}")
    yield Check("versions", "python", "ok", f"{platform.python_version()} in {sys.executable}, {platform.platform()}")
    wanted, extras = _requirements()
    for name in _SHOWN:
        yield _installed(name, wanted.get(name))
    dask, distributed = _version("dask"), _version("distributed")
    if dask != distributed:
        yield Check(
            "versions", "dask", "problem", f"dask {dask} and distributed {distributed} are not of one release",
            f"pip install dask=={distributed} distributed=={distributed}",
        )  # fmt: skip
    for extra, requirements in sorted(extras.items()):
        missing = [str(r) for r in requirements if not _is_met(r)]
        if missing:
            yield Check("extras", extra, "unused", f"lacks {', '.join(missing)}", f"pip install 'skyward[{extra}]'")
        else:
            yield Check("extras", extra, "ok", ", ".join(f"{r.name} {_version(r.name)}" for r in requirements))


def _requirements() -> tuple[dict[str, Requirement], dict[str, list[Requirement]]]:
    """Return what skyward needs, by name, and what each of its extras needs."""
    try:
        lines = importlib.metadata.requires("skyward") or []
    except importlib.metadata.PackageNotFoundError:  # run from a checkout
        return {}, {}
    needed: dict[str, Requirement] = {}
    extras: dict[str, list[Requirement]] = {}
    for requirement in map(Requirement, lines):
        extra = _extra_of(requirement)
        if extra is None:
            needed[requirement.name] = requirement
        elif extra not in _OWN_EXTRAS:
            extras.setdefault(extra, []).append(Requirement(str(requirement).partition(";")[0]))
    return needed, extras


def _extra_of(requirement: Requirement) -> str | None:
    marker = str(requirement.marker or "")
    return marker.rpartition("extra ==")[2].strip(" \"')") if "extra ==" in marker else None


def _installed(name: str, wanted: Requirement | None) -> Check:
    version = _version(name)
    if wanted is None or _is_met(wanted):
        return Check("versions", name, "ok", version)
    return Check("versions", name, "problem", f"{version}; skyward needs {wanted}", f"pip install '{wanted}'")


def _is_met(requirement: Requirement) -> bool:
    version = _version(requirement.name)
    return version != "not installed" and requirement.specifier.contains(version, prereleases=True)


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


# --- configuration ------------------------------------------------------------------------------------------


def _configuration() -> tuple[config.Settings, list[Check]]:
    try:
        settings = config.load()
    except SpecError as exc:
        problems = getattr(exc, "errors", ()) or (exc,)
        return config.Settings(), [
            Check("configuration", str(getattr(p, "option", None) or "file"), "problem", str(p), "correct it there")
            for p in problems
        ]
    project, user = config.project_file(), config.user_file()
    files = f"project's: {project or 'none from here upwards'}; user's: {user if user.exists() else f'none at {user}'}"
    checks = [Check("configuration", "files", "ok", files)]
    for key in config.KEYS:
        value = settings.get(key)
        shown = "none" if value is None else repr(value)
        checks.append(Check("configuration", key, "ok", f"{shown} ({settings.source(key)})"))
    try:
        providers.resolve(settings.get("provider"), settings.get("region"))
    except SpecError as exc:
        key = str(exc.option)  # type: ignore[attr-defined]
        checks.append(Check("configuration", key, "problem", str(exc), f"it comes from {settings.source(key)}"))
    return settings, checks


# --- clouds -------------------------------------------------------------------------------------------------


def _accounts(settings: config.Settings) -> Iterator[Check]:
    from skyward.providers.accounts import account

    named = settings.get("provider")
    configured = {name.lower() for name in ([named] if isinstance(named, str) else named)}
    clouds = [_with_region(cloud, settings) for cloud in providers.clouds()]
    for cloud, answer in zip(clouds, providers.ask_all(clouds, account), strict=True):
        name = cloud.name
        if isinstance(answer, ProviderError):
            yield _failed(name, answer, name in configured)
            continue
        who = f", {answer.identity}" if answer.identity else ""
        yield Check("clouds", name, "ok", f"credentials work: {answer.credentials}{who}")
        for what, limit in answer.limits.items():
            yield Check("clouds", name, "ok", f"{what}: {limit}")
        if answer.unknown:
            yield Check("clouds", name, "note", answer.unknown)
        if answer.problem:
            yield Check("clouds", name, "problem", answer.problem)


def _with_region(cloud: Cloud, settings: config.Settings) -> Cloud:
    try:
        found = providers.resolve(cloud.name, settings.get("region"))
    except SpecError:  # told with the configuration, or meant for another cloud
        return cloud
    return found[0] if isinstance(found, tuple) else cloud


def _failed(name: str, error: ProviderError, is_configured: bool) -> Check:
    missing = isinstance(error, CredentialsError) and error.missing
    if missing or isinstance(error.__cause__, ImportError):
        status: Literal["problem", "unused"] = "problem" if is_configured else "unused"
        return Check("clouds", name, status, str(error), "it is the configured provider" if is_configured else "")
    return Check("clouds", name, "problem", str(error))


# --- SSH ----------------------------------------------------------------------------------------------------


def _ssh() -> Iterator[Check]:
    if shutil.which("ssh"):
        yield Check("ssh", "client", "ok", _output(["ssh", "-V"])[1].strip())
    else:
        yield Check("ssh", "client", "note", "ssh is not installed; `skyward ssh` needs it, pools don't",
                    "install OpenSSH's client (openssh-client)")  # fmt: skip
    keys = sorted(path for path in _home_ssh().glob("id_*") if path.suffix != ".pub")
    yield _agent(bool(keys))
    if keys:
        yield Check("ssh", "keys", "ok", ", ".join(map(str, keys)))
    else:
        yield Check("ssh", "keys", "unused", f"there are none in {_home_ssh()}", "sky.SSH(..., key=) names others")
    known = _home_ssh() / "known_hosts"
    try:
        count = sum(bool(line.strip()) and not line.startswith("#") for line in known.read_text().splitlines())
    except (OSError, ValueError) as exc:
        why = "is not there" if isinstance(exc, FileNotFoundError) else f"can't be read: {exc}"
        yield Check("ssh", "known_hosts", "unused", f"{known} {why}",
                    "sky.SSH refuses unknown hosts: run `ssh HOST` once to record a key")  # fmt: skip
    else:
        yield Check("ssh", "known_hosts", "ok", f"{counted(count, 'key')} in {known}")


def _agent(has_keys: bool) -> Check:
    if not os.environ.get("SSH_AUTH_SOCK"):
        return Check("ssh", "agent", "unused", "SSH_AUTH_SOCK is not set",
                     "" if has_keys else "keys with a passphrase need one: `eval $(ssh-agent)`, `ssh-add`")  # fmt: skip
    if not shutil.which("ssh-add"):
        return Check("ssh", "agent", "note", "ssh-add is not installed, so its keys are unknown")
    status, output = _output(["ssh-add", "-l"])
    if status == 0:
        return Check("ssh", "agent", "ok", counted(len(output.splitlines()), "key"))
    if status == 1:  # ssh-add(1): it answers, and has none
        return Check("ssh", "agent", "note", "it has no keys", "add yours with `ssh-add`")
    return Check("ssh", "agent", "note", f"SSH_AUTH_SOCK is set, and no agent answers there: {output.strip()}",
                 "start one with `eval $(ssh-agent)`, or unset SSH_AUTH_SOCK")  # fmt: skip


def _home_ssh() -> Path:
    return Path("~/.ssh").expanduser()


def _output(command: Sequence[str]) -> tuple[int, str]:
    """Return the status of a command and all that it printed."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors="replace", timeout=_SSH_S,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as exc:
        return -1, str(exc)
    return done.returncode, done.stdout


# --- journal and guardian -----------------------------------------------------------------------------------


def _record() -> Iterator[Check]:
    from skyward.cleanup.guardian import LOG

    folder = paths.data_folder()
    try:
        for place in (folder, folder / "pools"):
            place.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=place):
                pass
        if (folder / LOG).exists() and not os.access(folder / LOG, os.W_OK):
            raise PermissionError(0, "can't be written", str(folder / LOG))
    except OSError as exc:
        yield Check(
            "record", "journal", "problem",
            f"{folder} can't be written; the journal of pools is there: {exc.strerror or exc}",
            "set SKYWARD_DATA_DIR to a writable folder",
        )  # fmt: skip
        return
    yield Check("record", "journal", "ok", str(folder))
    entries = journal.entries()
    orphans = [e.pool_id for e in entries if e.provider != "local" and e.owner_alive is False]
    if orphans:
        yield Check("record", "pools", "note", f"the owners of {', '.join(orphans)} are gone; they may still cost",
                    f"skyward down {' '.join(orphans)}")  # fmt: skip
    else:
        yield Check("record", "pools", "ok", f"{len(entries)} on record, none without an owner")
