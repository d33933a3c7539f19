"""Wheels in memory: the same content makes the same bytes."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from skyward.environment.wheels import WheelError, build, read


def write(path: Path, year: int) -> Path:
    path.parent.mkdir(exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in {"a.py": "", "a-1.dist-info/METADATA": "Name: a\nRequires-Dist: b>1\n"}.items():
            member = zipfile.ZipInfo(name, (year, 1, 1, 0, 0, 0))
            member.external_attr = 0o755 << 16
            archive.writestr(member, text)
    return path


def test_when_a_wheel_was_built_does_not_count(tmp_path: Path) -> None:
    first = read(write(tmp_path / "x" / "a-1-py3-none-any.whl", 2024))
    second = read(write(tmp_path / "y" / "a-1-py3-none-any.whl", 2025))

    assert first == second
    assert (first.project, first.version, first.requirements) == ("a", "1", ("b>1",))
    (tmp_path / "again.whl").write_bytes(first.data)
    with zipfile.ZipFile(tmp_path / "again.whl") as archive:
        assert archive.getinfo("a.py").external_attr == 0o755 << 16


def test_what_is_no_wheel_for_machines_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a-1-py3-none-any.whl").write_text("no archive")

    for path in (tmp_path / "a-1-py3-none-any.whl", write(tmp_path / "a-1-cp311-cp311-macosx_11_0_arm64.whl", 2024)):
        with pytest.raises(WheelError, match=r"can be read|built for macosx"):
            read(path)


def test_a_failed_build_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "uv").write_text("#!/bin/sh\necho no compiler >&2\nexit 2\n")
    (tmp_path / "uv").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    with pytest.raises(WheelError, match=r"uv build .* failed: no compiler"):
        build(tmp_path)
