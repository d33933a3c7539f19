"""An image of uv's lock file, a real one of a workspace with extras that exclude each other."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import skyward as sky
from skyward.environment import found, uv_lock
from skyward.spec.image import Image
from tests.environment.packages import build_quickly, install

LOCK = Path(__file__).parent.parent / "data" / "uv" / "uv.lock"


@pytest.fixture
def workspace(workplace: Path, site: Path) -> Path:
    """A folder with the lock file and both projects of the workspace; nothing of it is installed."""
    shutil.copy(LOCK, workplace / "uv.lock")
    return workplace


def pins(image: Image) -> set[str]:
    return {text.partition(" --hash")[0] for text in image.pip}




def test_a_lock_file_is_read_without_uv(workspace: Path) -> None:
    image = sky.Image.from_here()

    names = {text.partition("==")[0] for text in pins(image)}
    assert names == {
        "anyio", "certifi", "click", "h11", "httpcore", "httpx", "idna", "python-dateutil", "socksio",
        "typing-extensions", "tzdata", "zipp",
    }  # fmt: skip
    assert "idna==3.10" in pins(image)  # neither of the extras is installed
    assert next(text for text in pins(image) if "zipp" in text).endswith("; platform_machine == 'x86_64'")
    assert all(" --hash=sha256:" in text for text in image.pip)
    assert set(image.not_reproduced) == {"app", "speed"}  # their folders are not there


def test_extras_and_groups_that_are_installed_count(workspace: Path, site: Path) -> None:
    install(site, "idna", "3.6")
    install(site, "iniconfig", "2.3.0")

    image = sky.Image.from_here()

    assert "idna==3.6" in pins(image)
    assert any(text.startswith("iniconfig") for text in image.pip)
    assert not any(text.startswith("cycler") for text in image.pip)


def test_another_version_than_the_locked_one_is_named(workspace: Path, site: Path) -> None:
    install(site, "click", "7.0")

    assert "7.0 is installed here: run `uv sync`" in sky.Image.from_here().not_reproduced["click"]


def test_the_projects_of_a_workspace_become_wheels(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(found, "build", build_quickly)
    (workspace / "libs" / "speed").mkdir(parents=True)

    of_app = sky.Image.from_here()
    monkeypatch.chdir(workspace / "libs" / "speed")
    (workspace / ".git").mkdir()
    image = sky.Image.from_here()

    assert [wheel.name for wheel in of_app.wheels] == ["work-1.0-py3-none-any.whl", "speed-1.0-py3-none-any.whl"]
    assert [wheel.name for wheel in image.wheels] == ["speed-1.0-py3-none-any.whl"]
    assert {text.partition("==")[0] for text in image.pip} == {"python-dateutil", "tzdata"}


def test_on_a_mac_packages_have_the_markers_of_machines(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uv_lock, "is_linux_here", lambda: False)
    here = found.linux("arm64") | {"sys_platform": "darwin"}
    monkeypatch.setattr(uv_lock, "default_environment", lambda: here)

    image = sky.Image.from_here()

    (zipp,) = [text for text in pins(image) if "zipp" in text]
    assert zipp.endswith("; sys_platform == 'linux' and platform_machine == 'x86_64'")
    assert "click==" + next(t for t in pins(image) if t.startswith("click==")).partition("==")[2] in pins(image)
    assert image.not_reproduced["appnope"] == "uv.lock needs it on this system and not on Linux"


def test_all_kinds_of_sources_are_read(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(found, "build", build_quickly)
    (workplace / "uv.lock").write_text("""
version = 1
[[package]]
name = "app"
version = "1"
source = { virtual = "." }
dependencies = [{ name = "a" }, { name = "b" }, { name = "c" }, { name = "d" }, { name = "e" }]
[[package]]
name = "a"
version = "1"
source = { git = "https://host/r?subdirectory=x&rev=main#0123abcd" }
[[package]]
name = "b"
version = "1"
source = { url = "https://host/b-1.tar.gz" }
sdist = { hash = "sha256:HASH" }
[[package]]
name = "c"
version = "1+cu121"
source = { registry = "https://host/cu121" }
[[package]]
name = "d"
version = "1"
source = { directory = "d" }
[[package]]
name = "e"
version = "1"
source = { registry = "../wheels" }
""".replace("HASH", "ab" * 32))
    (workplace / "d").mkdir()

    image = sky.Image.from_here()

    assert image.pip == (
        "a @ git+https://host/r@0123abcd#subdirectory=x", f"b @ https://host/b-1.tar.gz --hash=sha256:{'ab' * 32}",
        "c==1+cu121", "e==1",
    )  # fmt: skip
    assert image.indexes == ("https://host/cu121",)
    assert [wheel.name for wheel in image.wheels] == ["d-1.0-py3-none-any.whl"]
    assert list(image.not_reproduced) == ["index ../wheels"]


@pytest.mark.parametrize(("text", "words"), [("version = 2", "expected a lock file of uv"), ("[", "can't read")])
def test_a_lock_file_that_can_not_be_read_raises(workplace: Path, text: str, words: str) -> None:
    (workplace / "uv.lock").write_text(text)

    with pytest.raises(sky.SpecError, match=words):
        sky.Image.from_here()
