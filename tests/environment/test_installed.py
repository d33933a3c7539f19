"""An image of what is installed: pins, wheels and addresses, and what machines don't get."""

from __future__ import annotations

import io
import json
import logging
import pickle
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

import skyward as sky
from skyward.environment import found, installed
from tests.environment.packages import install, project


def test_each_installed_package_is_pinned_to_its_version(site: Path) -> None:
    install(site, "Foo_Bar", "1.2")
    install(site, "setuptools", "80.1")
    install(site, "skyward", "9.9")

    image = sky.Image.from_here()

    assert set(image.pip) == {"foo-bar==1.2", "setuptools==80.1"}
    assert image.not_reproduced == {}


def test_addresses_and_commits_are_kept(site: Path) -> None:
    commit = {"vcs": "git", "commit_id": "0123abcd", "requested_revision": "main"}
    install(site, "a", direct_url={"url": "https://host/r.git", "vcs_info": commit, "subdirectory": "lib"})
    archive = {"hashes": {"sha256": "ab"}, "hash": "sha256=ab"}
    install(site, "b", direct_url={"url": "https://host/b-1.0-py3-none-any.whl", "archive_info": archive})

    assert set(sky.Image.from_here().pip) == {
        "a @ git+https://host/r.git@0123abcd#subdirectory=lib",
        "b @ https://host/b-1.0-py3-none-any.whl#sha256=ab",
    }


@pytest.mark.parametrize(
    "direct_url",
    [
        {"url": "file:///gone", "dir_info": {}},
        {"url": "file:///gone/mine-1.0-py3-none-any.whl", "archive_info": {}},
        {"url": "ssh://git@host/r.git", "vcs_info": {"vcs": "git", "commit_id": "ab"}},
        {"url": "https://${USER}:${TOKEN}@host/r.git", "vcs_info": {"vcs": "git", "commit_id": "ab"}},
        {"url": "https://****@host/mine.tar.gz", "archive_info": {}},
    ],
    ids=lambda direct: direct["url"],
)
def test_what_machines_can_not_fetch_is_packed_as_it_is_here(site: Path, direct_url: dict[str, Any]) -> None:
    files = {
        "mine/__init__.py": "X = 1\n", "mine/__pycache__/x.pyc": "", "../bin/mine-tool": f"#!{sys.executable}\n",
        "../etc/mine.ini": "x=1\n", "../bin/mine": "made by pip\n",
    }  # fmt: skip
    info = install(site, "mine", direct_url=direct_url, files=files, requires=["numpy>=2"])
    (info / "entry_points.txt").write_text("[console_scripts]\nmine = mine:main\n")

    image = sky.Image.from_here()

    (wheel,) = image.wheels
    assert (wheel.name, wheel.requirements) == ("mine-1.0-py3-none-any.whl", ("numpy>=2",))
    with zipfile.ZipFile(io.BytesIO(wheel.data)) as archive:
        members = {name: archive.read(name).decode() for name in archive.namelist()}
    assert set(members) == {
        "mine/__init__.py", "mine-1.0.data/scripts/mine-tool", "mine-1.0.data/data/etc/mine.ini",
        "mine-1.0.dist-info/METADATA", "mine-1.0.dist-info/WHEEL", "mine-1.0.dist-info/RECORD",
    }  # fmt: skip
    assert members["mine-1.0.data/scripts/mine-tool"] == "#!python\n"
    assert (image.pip, image.not_reproduced) == ((), {})


@pytest.mark.slow
def test_an_editable_package_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = project(tmp_path / "my project", "mine", "0.4")
    direct = {"url": folder.as_uri(), "dir_info": {"editable": True}}
    install(tmp_path / "more", "mine", "0.4", direct_url=direct)
    monkeypatch.syspath_prepend(str(tmp_path / "more"))  # beside the pip that builds it

    image = sky.Image.from_here()

    assert [wheel.name for wheel in image.wheels] == ["mine-0.4-py3-none-any.whl"]
    assert not any(text.startswith("mine") for text in image.pip)
    assert pickle.loads(pickle.dumps(image)) == image


def test_the_hash_of_an_image_has_the_content_of_its_wheels(site: Path) -> None:
    direct = {"url": "file:///x", "dir_info": {}}
    install(site, "mine", direct_url=direct, files={"mine.py": "X = 1\n"})

    first, second = sky.Image.from_here(), sky.Image.from_here()
    (site / "mine.py").write_text("X = 2\n")
    third = sky.Image.from_here()

    assert first == second != third
    assert first.content_hash() == second.content_hash() != third.content_hash()


def test_an_editable_package_that_can_not_be_built_is_named(site: Path, tmp_path: Path) -> None:
    direct = {"url": tmp_path.as_uri(), "dir_info": {"editable": True}}
    install(site, "broken", direct_url=direct)
    install(site, "gone", direct_url={"url": "file:///no/such/folder", "dir_info": {"editable": True}})

    missing = sky.Image.from_here().not_reproduced

    assert "still travel as source" in missing["broken"]
    assert missing["gone"] == "/no/such/folder does not exist"


def test_a_develop_install_says_less_than_an_editable_one(
    tmp_path: Path, site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    egg = tmp_path / "project" / "mine.egg-info"
    egg.mkdir(parents=True)
    (egg / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1\n")
    monkeypatch.setattr(sys, "path", [str(egg.parent), *sys.path])

    alone = sky.Image.from_here().not_reproduced
    (egg.parent / "setup.py").write_text("")
    with_setup = sky.Image.from_here().not_reproduced
    install(site, "mine", "1.1")

    assert "is no project" in alone["mine"]
    assert f"no wheel of {egg.parent}" in with_setup["mine"]
    assert sky.Image.from_here().pip == ("mine==1.1",)


def test_conda_packages_are_pinned_and_others_of_conda_are_named(site: Path, tmp_path: Path) -> None:
    install(site, "numpy", "2.1.0", installer="conda", direct_url={"url": "file:///croot/numpy", "dir_info": {}})
    install(site, "conda-build", installer="conda")
    records = tmp_path / "conda-meta"
    records.mkdir()
    for name, file in {"numpy-2.1.0-py311_0": "numpy-2.1.0.dist-info/METADATA", "mkl-2024.1-h1_0": "lib/x.so"}.items():
        (records / f"{name}.json").write_text(json.dumps({"files": [file]}))
    (records / "python-3.11.1-h1_0.json").write_text(json.dumps({"files": ["bin/python"]}))

    image = sky.Image.from_here()

    assert image.pip == ("numpy==2.1.0",)
    assert image.not_reproduced == {
        "conda-build": "a part of conda", "mkl": "a conda package that is not a Python package"
    }  # fmt: skip


def test_packages_of_the_system_are_named(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(site, "python-apt", installer="debian")
    by_installer = sky.Image.from_here()
    install(site, "ufw", installer="")
    monkeypatch.setattr(installed, "_SYSTEM", installed.re.compile(str(site)))
    by_folder = sky.Image.from_here()

    assert (by_installer.pip, by_folder.pip) == ((), ())
    assert "package manager" in by_installer.not_reproduced["python-apt"]
    assert "package manager" in by_folder.not_reproduced["ufw"]
    assert not installed._SYSTEM.fullmatch("/usr/local/lib/python3.11/dist-packages")


@pytest.mark.parametrize("folder", ["/usr/lib/python3/dist-packages", "/usr/lib64/python3.13/site-packages"])
def test_folders_of_the_system_are_known(folder: str) -> None:
    assert installed._SYSTEM.fullmatch(folder)
    assert not installed._SYSTEM.fullmatch(folder.replace("/usr", "/usr/local"))


def test_packages_for_another_system_and_installers_are_named(site: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("pip", "pywin32", "pyobjc-framework-Cocoa", "numpy"):
        install(site, name)

    with caplog.at_level(logging.INFO, "skyward.environment"):
        image = sky.Image.from_here()

    assert image.pip == ("numpy==1.0",)
    assert set(image.not_reproduced) == {"pip", "pywin32", "pyobjc-framework-cocoa"}
    (line,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "pywin32 (it works on Windows alone" in line.getMessage()
    assert "pywin32" in repr(image)


def test_installers_alone_are_no_reason_to_warn(site: Path, caplog: pytest.LogCaptureFixture) -> None:
    install(site, "pip")
    install(site, "numpy")

    with caplog.at_level(logging.WARNING, "skyward.environment"):
        image = sky.Image.from_here(exclude=["NumPy"])

    assert image.not_reproduced == {"pip": found._INSTALLER, "numpy": "excluded"}
    assert not caplog.records


def test_on_a_mac_what_nothing_needs_on_linux_is_named(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installed, "is_linux_here", lambda: False)
    monkeypatch.setattr(installed, "default_environment", lambda: found.linux("arm64") | {"sys_platform": "darwin"})
    install(site, "kernel", requires=["onmac; sys_platform == 'darwin'", "both", "asked; sys_platform == 'darwin'"])
    install(site, "onmac")
    install(site, "both")
    (install(site, "asked") / "REQUESTED").touch()

    image = sky.Image.from_here()

    assert set(image.pip) == {"kernel==1.0", "both==1.0", "asked==1.0"}
    assert set(image.not_reproduced) == {"onmac"}


def test_a_wheel_for_another_system_is_named(site: Path) -> None:
    local = {"url": "file:///x", "dir_info": {}}
    install(site, "fast", direct_url=local, tag="cp311-cp311-macosx_11_0_arm64", files={"fast.so": ""})
    far = {"url": "https://host/far-1.0-cp311-cp311-win_amd64.whl", "archive_info": {}}
    install(site, "far", direct_url=far)

    image = sky.Image.from_here()

    assert (image.pip, image.wheels) == ((), ())
    assert "built for macosx_11_0_arm64" in image.not_reproduced["fast"]
    assert "built for win_amd64" in image.not_reproduced["far"]


def test_a_local_version_label_is_dropped_and_named(site: Path) -> None:
    install(site, "torch", "2.4.0+cu121")

    image = sky.Image.from_here()
    kept = sky.Image.from_here(pip=["torch==2.4.0+cu121"], pip_extra_index_url="https://host/cu121")

    assert image.pip == ("torch==2.4.0",)
    assert "pip_extra_index_url=" in image.not_reproduced["torch"]
    assert (kept.pip, kept.indexes) == (("torch==2.4.0+cu121",), ("https://host/cu121",))
    assert kept.not_reproduced == {}


def test_other_options_of_an_image_are_kept(site: Path) -> None:
    image = sky.Image.from_here(apt=["git"], env={"A": "1"}, include=["data"], preload=["json"])

    assert (image.apt, dict(image.env), image.include) == (("git",), {"A": "1"}, ("data",))
    assert image.preload == ("json",)


@pytest.mark.parametrize(
    "options", [{"exclude": "numpy"}, {"pip": ["a b"]}, {"pip_extra_index_url": ["ftp://x"]}], ids=str
)
def test_bad_values_raise_before_anything_is_read(options: Any) -> None:
    with pytest.raises(sky.SpecError, match=r"Image.from_here\(.*is invalid: expected"):
        sky.Image.from_here(**options)


def test_a_script_can_not_carry_wheels(site: Path) -> None:
    install(site, "mine", direct_url={"url": "file:///x", "dir_info": {}}, files={"mine.py": ""})

    with pytest.raises(sky.SpecError, match="carries no files"):
        sky.Image.from_here().bootstrap()
