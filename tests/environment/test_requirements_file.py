"""An image of a requirements file: options, paths, addresses, hashes, and what machines don't get."""

from __future__ import annotations

from pathlib import Path

import pytest

import skyward as sky
from skyward.environment import found
from tests.environment.packages import build_quickly, install

HASH = "ab" * 32


def write(folder: Path, text: str, name: str = "requirements.txt") -> Path:
    (folder / name).write_text(text)
    return folder / name


def test_a_requirements_file_beside_the_script_is_used(workplace: Path, site: Path) -> None:
    install(site, "not-in-the-file")
    lines = ["\ufeff# a comment", "Numpy>=1.20,<3  # why", "", "pandas[excel,sql] ; python_version >= '3.8'", "x==1.*"]
    write(workplace, "\n".join(lines))

    image = sky.Image.from_here()

    assert image.pip == ("Numpy<3,>=1.20", 'pandas[excel,sql]; python_version >= "3.8"', "x==1.*")
    assert image.not_reproduced == {}


def test_other_files_constraints_and_indexes_are_followed(workplace: Path) -> None:
    (workplace / "more").mkdir()
    write(workplace, "-r more/base.txt\n--constraint=more/c.txt\n-i https://one/simple/\n--extra-index-url https://two\n")
    write(workplace, "numpy\n-r ../requirements.txt\n", "more/base.txt")
    write(workplace, "numpy[x]<3\nidna==3.6\nnothing\n-e ../lib\n", "more/c.txt")

    image = sky.Image.from_here(pip_extra_index_url="https://zero")

    assert (image.pip, image.constraints) == (("numpy",), ("numpy<3", "idna==3.6"))
    assert image.indexes == ("https://zero", "https://one/simple", "https://two")


def test_hashes_and_continued_lines_are_kept(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HERE_TOKEN", "secret")
    write(workplace, f"a==1 ; os_name == 'posix' \\\n    --hash=sha256:{HASH} \\\n    --hash=sha512:{HASH}{HASH}\n"
                     "b @ https://${HERE_TOKEN}@host/b.tar.gz\n--require-hashes\n")  # fmt: skip

    image = sky.Image.from_here()

    first = f'a==1; os_name == "posix" --hash=sha256:{HASH} --hash=sha512:{HASH}{HASH}'
    assert image.pip == (first, "b @ https://secret@host/b.tar.gz")
    assert image.not_reproduced == {}


def test_paths_become_wheels_and_their_extras_requirements(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(found, "build", build_quickly)
    for name in ("lib", "more", "named", "old"):
        (workplace / name).mkdir()
    write(workplace, "-e ./lib[fancy]\n./old ; sys_platform == 'win32'\nmore @ file:more\nnamed @ ./named\n")

    image = sky.Image.from_here()

    assert [wheel.name for wheel in image.wheels] == [
        f"{name}-1.0-py3-none-any.whl" for name in ("lib", "more", "named")
    ]
    assert image.pip == ("rich",)


def test_addresses_without_a_name_get_the_one_in_them(workplace: Path) -> None:
    write(workplace, "https://host/foo-1.0-py3-none-any.whl\n-e git+https://host/r@v1#egg=bar&subdirectory=x\n"
                     "git+https://host/s#egg=baz\nhttps://host/qux-1.0.tar.gz\n")  # fmt: skip

    assert sky.Image.from_here().pip == (
        "foo @ https://host/foo-1.0-py3-none-any.whl", "bar @ git+https://host/r@v1#subdirectory=x",
        "baz @ git+https://host/s", "qux @ https://host/qux-1.0.tar.gz",
    )  # fmt: skip


def test_an_editable_repository_of_which_machines_have_no_key_is_built(
    workplace: Path, site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(found, "build", build_quickly)
    (workplace / "mine").mkdir()
    install(site, "mine", direct_url={"url": (workplace / "mine").as_uri(), "dir_info": {"editable": True}})
    write(workplace, "-e git+ssh://git@host/mine.git@v1#egg=mine\n")

    assert [wheel.digest for wheel in sky.Image.from_here().wheels] == [build_quickly(Path("mine")).digest]


def test_what_machines_do_not_get_of_a_file_is_named(workplace: Path, site: Path) -> None:
    write(workplace, "pywin32==306\npip\nskyward\nskyward[aws]\nx @ git+ssh://git@host/r\n-e ./gone-folder.zip\n"
                     "--find-links https://me:pw@host/wheels\n--pre\n--index-url file:///opt/simple\n"
                     "old ; sys_platform == 'win32'\n")  # fmt: skip

    image = sky.Image.from_here()

    assert image.pip == ("skyward[aws]", 'old; sys_platform == "win32"')
    assert list(image.not_reproduced) == [
        "pywin32", "pip", "x", "gone-folder.zip", "--find-links https://...@host/wheels", "--pre",
        "index file:///opt/simple",
    ]  # fmt: skip
    assert "git@" not in image.not_reproduced["x"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("numpy\n==\n", "line 2 of .*, '==', is invalid: expected a requirement in pip's format"),
        ("./no-such-folder", "or the path of a project"),
        ("git+https://host/repo", "expected name @ address"),
        ("-r https://host/r.txt", "expected the path of a file"),
        ("-r nowhere.txt", "can't read .*nowhere.txt"),
    ],
)
def test_a_line_that_can_not_be_read_raises(workplace: Path, text: str, expected: str) -> None:
    write(workplace, text)

    with pytest.raises(sky.SpecError, match=expected):
        sky.Image.from_here()
