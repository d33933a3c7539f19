"""Buckets that machines show as folders."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from skyward.spec.validation import (
    Problems,
    check_bool,
    check_index_url,
    check_text,
)


@dataclass(frozen=True, slots=True)
class Volume:
    """Storage that is mounted at `mount_path` on every machine, from the first call to the last."""

    mount_path: str

    def __post_init__(self) -> None:
        problems = Problems(type(self).__name__)
        path = problems.check("mount_path", self.mount_path, _check_mount_path)
        problems.raise_if_any()
        object.__setattr__(self, "mount_path", path)


def _is_plain(text: str) -> bool:
    """Tell whether a shell would see nothing in `text` but a word."""
    return text.isprintable() and not text.startswith("-") and not any(c in text for c in "'\"\\$`;&|<>*?()[]{}!#~")


# Where a machine's own files are: a volume over them, or inside of what the system makes by itself, ends the machine.
_SYSTEM_FOLDERS = (
    "bin", "boot", "dev", "etc", "lib", "lib32", "lib64", "libx32", "proc", "run", "sbin", "sys", "usr", "var"
)  # fmt: skip
_TAKEN_FOLDERS = ("/home", "/root", "/tmp")


def _check_mount_path(value: Any) -> str:
    path = check_text(value).rstrip("/")
    parts = path[1:].split("/")
    if not path.startswith("/") or not _is_plain(path) or any(part in ("", ".", "..") for part in parts):
        raise ValueError("an absolute path such as '/data', without quotes or shell characters")
    if parts[0] in _SYSTEM_FOLDERS or path in _TAKEN_FOLDERS:
        raise ValueError("a separate folder such as '/data', not one that the system needs")
    return path


def _parts(prefix: str) -> list[str]:
    inner = prefix.strip("/")
    return inner.split("/") if inner else []


def _check_prefix(value: Any) -> str:
    if not isinstance(value, str) or not _is_plain(value) or any(p in ("", ".", "..") for p in _parts(value)):
        raise ValueError("a text such as 'datasets/2024/', without quotes or shell characters")
    return value


@dataclass(frozen=True, slots=True)
class S3Volume(Volume):
    """A bucket, or the part of it under `prefix`, as a folder.

    `endpoint_url` is for services with S3's protocol. What calls have written is uploaded before a machine is
    destroyed, as long as there is progress; `VolumeError` is raised at the end of the block for the rest.
    """

    bucket: str = ""
    prefix: str = ""
    read_only: bool = True
    endpoint_url: str | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        problems = Problems("S3Volume")
        path = problems.check("mount_path", self.mount_path, _check_mount_path)
        problems.check("bucket", self.bucket, _check_bucket)
        problems.check("prefix", self.prefix, _check_prefix)
        problems.check("read_only", self.read_only, check_bool)
        problems.check("endpoint_url", self.endpoint_url, check_index_url)
        problems.raise_if_any()
        object.__setattr__(self, "mount_path", path)


def _check_bucket(value: Any) -> str:
    import re

    # Rules of bucket names: Amazon S3 User Guide, "General purpose bucket naming rules".
    if not isinstance(value, str) or not re.fullmatch(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]", value):
        raise ValueError("a bucket's name: 3 to 63 lower-case letters, digits, dots and dashes")
    return value
