"""Where the environment is described: beside the script, further up in its project, or nowhere."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from types import ModuleType

import pytest

import skyward as sky
from tests.environment.packages import install


@pytest.fixture(autouse=True)
def _installed(site: Path) -> None:
    install(site, "installed")


def run_as(path: Path, monkeypatch: pytest.MonkeyPatch, text: str = "") -> None:
    """Make this process look like one that runs a script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    main = ModuleType("__main__")
    main.__file__ = str(path)
    monkeypatch.setitem(sys.modules, "__main__", main)


def test_without_a_file_the_image_has_what_is_installed(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "skyward.environment"):
        assert sky.Image.from_here().pip == ("installed==1.0",)

    assert "the image has 1 packages, from what is installed in" in caplog.text


def test_the_folder_of_the_script_counts_and_not_the_working_directory(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (workplace / "requirements.txt").write_text("of-the-working-directory")
    run_as(tmp_path / "scripts" / "train.py", monkeypatch)

    before = sky.Image.from_here()
    (tmp_path / "scripts" / "requirements.txt").write_text("beside-the-script")

    assert before.pip == ("installed==1.0",)
    assert sky.Image.from_here().pip == ("beside-the-script",)


@pytest.mark.parametrize("program", ["bin/pytest", "site-packages/tool/__main__.py"])
def test_an_installed_program_works_on_the_working_directory(
    program: str, workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (workplace / "requirements.txt").write_text("here")
    run_as(tmp_path / program, monkeypatch)

    assert sky.Image.from_here().pip == ("here",)


@pytest.mark.parametrize("mark", [".git", "pyproject.toml"])
def test_files_are_searched_up_to_the_root_of_the_project(
    mark: str, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (workplace / "src").mkdir()
    (workplace / "requirements.txt").write_text("of-the-project")
    monkeypatch.chdir(workplace / "src")

    outside = sky.Image.from_here()
    (workplace / mark).touch()
    inside = sky.Image.from_here()
    (workplace / "uv.lock").write_text("version = 1")

    assert (outside.pip, inside.pip) == (("installed==1.0",), ("of-the-project",))
    assert sky.Image.from_here().pip == ()  # a lock file goes before


def test_folders_of_other_users_are_not_searched(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (workplace / "src").mkdir()
    (workplace / ".git").touch()
    (workplace / "requirements.txt").write_text("planted")
    monkeypatch.chdir(workplace / "src")
    monkeypatch.setattr("os.getuid", lambda: 12345)

    assert sky.Image.from_here().pip == ("installed==1.0",)


def test_a_script_with_its_own_metadata_has_what_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_as(tmp_path / "scripts" / "train.py", monkeypatch, "# /// script\n# dependencies = []\n# ///\n")
    (tmp_path / "scripts" / "requirements.txt").write_text("beside-the-script")

    assert sky.Image.from_here().pip == ("installed==1.0",)
