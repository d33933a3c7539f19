"""The script that makes a machine ready, what it installs, and the wheel of skyward itself. No machine is needed."""

from __future__ import annotations

import importlib.metadata
import io
import os
import shlex
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.requirements import Requirement

import skyward as sky
import skyward.scripts.bootstrap
from skyward.cluster.requirements import described, recipe
from skyward.cluster.wheel import own_wheel
from skyward.environment.wheels import pack
from skyward.scripts.bootstrap import Recipe, script
from skyward.scripts.steps import NEUTRAL, Progress, read_progress
from skyward.spec.image import Image

SHELLS = [shell for shell in ("sh", "dash", "bash", "busybox") if shutil.which(shell)]


def check_syntax(shell: str, text: str) -> None:
    command = ["busybox", "sh"] if shell == "busybox" else [shell]
    done = subprocess.run([*command, "-n"], input=text, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def run_function(text: str, function: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run one function of a script, with the commands that it may call replaced by one that notes its arguments."""
    commands = folder / "bin"
    commands.mkdir(exist_ok=True)
    for name in ("uv", "apt-get", "dpkg-query", "sudo", "id"):
        (commands / name).write_text(f'#!/bin/sh\nfor a in "$@"; do printf \'%s\\n\' "$a"; done >> {folder}/{name}\n')
        (commands / name).chmod(0o755)
    definitions = text.rpartition("\n# An incomplete environment")[0]
    calls = f'{definitions}\nuv={commands}/uv\nmkdir -p "$environment"\n{function}\n'
    environment = {
        "PATH": f"{commands}:{os.environ['PATH']}",
        "HOME": str(folder),
        "SKYWARD_HOME": str(folder / "home"),
    }
    return subprocess.run(["sh"], input=calls, env=environment, capture_output=True, text=True)


names = st.from_regex(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,8}[A-Za-z0-9])?", fullmatch=True)
requirements = st.one_of(
    names,
    st.builds("{}{}{}".format, names, st.sampled_from(["==", ">=", "<", "!=", " ~= "]), st.just("1.0")),
    st.builds("{}[{}] >1,<3 ; python_version < '3.14' and platform_system == \"Linux\"".format, names, names),
    st.builds("{} @ https://example.org/a?b=1&c=2#egg={}".format, names, names),
    st.just("END_OF_REQUIREMENTS"),
    st.just("x ; platform_version == 'it, !* +' or os_name != \"\""),
)
images = st.builds(
    Image,
    python=st.sampled_from([None, "3.11", "3.12.4"]),
    pip=st.lists(requirements, max_size=4),
    pip_extra_index_url=st.sampled_from([None, "https://user:p%40ss@example.org/simple?a=[1],b"]),
    apt=st.lists(st.sampled_from(["hello", "g++", "libc6-dev=2.36-9+deb12u4~x:1"]), max_size=3),
)


# --- the script ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("ttl", [0, 3600])
def test_every_posix_shell_reads_the_script_of_an_image(shell: str, ttl: int) -> None:
    image = Image(python="3.12", pip=["numpy", "x ; os_name != ''"], apt=["hello"])

    check_syntax(shell, image.bootstrap(ttl))


@settings(max_examples=40)
@given(images)
def test_any_image_that_is_accepted_makes_a_script_that_a_shell_reads(image: Image) -> None:
    check_syntax("dash" if "dash" in SHELLS else "sh", image.bootstrap(ttl=60))


@settings(max_examples=25)
@given(st.lists(requirements, min_size=1, max_size=4, unique=True))
def test_requirements_reach_the_installer_as_they_are(tmp_path_factory: Any, pip: list[str]) -> None:
    folder = tmp_path_factory.mktemp("machine")
    made = Recipe(python="3.11", requirements=tuple(pip), constraints=("b==1",))

    done = run_function(script(made), "install_packages", folder)

    environment = folder / "home" / "envs" / made.key
    assert (done.returncode, done.stderr) == (0, "")
    assert (environment / "requirements.txt").read_text().splitlines() == pip
    assert (environment / "constraints.txt").read_text() == "b==1\n"
    assert str(environment / "requirements.txt") in (folder / "uv").read_text().splitlines()


def test_a_requirement_cannot_end_the_list_and_run_as_a_command(tmp_path: Path) -> None:
    made = Recipe(python="3.11", requirements=("END_OF_REQUIREMENTS", "reboot"))

    run_function(script(made), "install_packages", tmp_path)

    lines = (tmp_path / "home" / "envs" / made.key / "requirements.txt").read_text().splitlines()
    assert lines == ["END_OF_REQUIREMENTS", "reboot"]


def test_the_first_python_of_the_path_that_has_the_version_is_taken(tmp_path: Path) -> None:
    for folder, name, ok in (("a", "python3.11", False), ("b b", "python3", True), ("c", "python3", True)):
        program = tmp_path / folder / name
        program.parent.mkdir()
        program.write_text(f"#!/bin/sh\n[ {int(ok)} = 1 ] && echo {folder}\n")
        program.chmod(0o755)
    path = ":".join(str(tmp_path / folder) for folder in ("a", "b b", "c"))
    text = script(Recipe(python="3.11.4")).replace('PATH="$PATH:', f'PATH="{path}:$PATH:')

    done = run_function(text, 'find_python && echo "$python"', tmp_path)

    assert done.stdout == "b b\n"


@pytest.mark.parametrize("shell", SHELLS)
def test_variables_that_lead_to_packages_are_kept_and_others_not(shell: str) -> None:
    kept = {"PIP_INDEX_URL": "a b", "UV_INDEX_MINE_PASSWORD": "x", "UV_DEFAULT_INDEX": "y", "HTTPS_PROXY": "z"}
    dropped = ("PYTHONHOME", "PYTHONPATH", "PIP_TARGET", "UV_PYTHON", "VIRTUAL_ENV", "CONDA_PREFIX")
    command = ["busybox", "sh"] if shell == "busybox" else [shell]

    done = subprocess.run(
        [*command, "-uc", f"{NEUTRAL}; env"], env=os.environ | kept | dict.fromkeys(dropped, "x\nA=b"),
        capture_output=True, text=True, check=True,
    )  # fmt: skip

    assert {f"{name}={value}" for name, value in kept.items()} <= set(done.stdout.splitlines())
    assert not [line for line in done.stdout.splitlines() if line.partition("=")[0] in dropped]


def test_debian_packages_are_words_for_apt_get(tmp_path: Path) -> None:
    text = Image(apt=["g++", "hello=2.10-3"]).bootstrap()

    done = run_function(text.replace("step apt install_apt", ":"), 'as_root() { "$@"; }; install_apt', tmp_path)

    assert done.stderr == ""
    assert (tmp_path / "apt-get").read_text().splitlines()[-3:] == ["--", "g++", "hello=2.10-3"]


def test_the_dead_man_precedes_steps_that_may_fail_and_is_optional() -> None:
    image = Image(pip=["numpy"], apt=["hello"])

    assert image.bootstrap(900).index("sleep 900") < image.bootstrap(900).index("install_apt")
    assert "poweroff" not in image.bootstrap()


@pytest.mark.parametrize("ttl", [-1, 1.5, "60; reboot", None])
def test_a_time_to_live_is_a_number_of_seconds(ttl: Any) -> None:
    with pytest.raises(sky.SpecError, match=r"ttl.*integer >= 0"):
        Image().bootstrap(ttl)


def test_the_script_uses_the_callers_python_unless_the_image_names_one() -> None:
    here = f"{sys.version_info[0]}.{sys.version_info[1]}"

    assert f"python{here} " in Image().bootstrap()
    assert "python3.12.4 " in Image(python="3.12.4").bootstrap()


def test_the_password_of_an_index_is_no_argument_of_a_command() -> None:
    text = Image(pip_extra_index_url="https://user:secret@example.org/simple").bootstrap()

    assert [line.strip() for line in text.splitlines() if "secret" in line] == [
        "export UV_INDEX=https://user:secret@example.org/simple"
    ]


def test_an_extra_index_wins_over_newer_versions_elsewhere(tmp_path: Path) -> None:
    text = Image(pip_extra_index_url="https://example.org/simple").bootstrap()
    show = 'use_pip_settings; echo "$UV_INDEX_STRATEGY ${UV_INDEX%% *}"'

    def settings(function: str) -> str:
        return run_function(text, function, tmp_path).stdout.strip()

    assert settings(show) == "unsafe-first-match https://example.org/simple"
    assert settings(f"UV_INDEX_STRATEGY=first-index; {show}") == "first-index https://example.org/simple"


def test_an_environment_is_named_by_what_is_in_it_in_whatever_order() -> None:
    one = Recipe(python="3.11", requirements=("a", "b"), constraints=("c==1",))

    assert one.key == Recipe(python="3.11", requirements=("b", "a"), constraints=("c==1",)).key
    assert one.key == Recipe(python="3.11", requirements=("a", "b"), constraints=("c==1",), wheel="w", apt=("x",)).key
    others = [
        Recipe(python="3.12", requirements=("a", "b"), constraints=("c==1",)),
        Recipe(python="3.11", requirements=("a", "b", "c==1")),
        Recipe(python="3.11", requirements=("a", "b"), constraints=("c==1",), extra_index_url="https://x"),
    ]
    assert len({one.key, *(o.key for o in others)}) == 4


# --- what it says -------------------------------------------------------------------------------------------


def test_progress_is_read_between_what_else_is_printed() -> None:
    assert read_progress([]) is None
    assert read_progress(["motd", "::skyward step uv", "noise"]) == Progress("uv")
    assert read_progress(["::skyward step uv", "::skyward step packages"]) == Progress("packages")


def test_a_failure_has_step_status_and_last_lines() -> None:
    output = ["::skyward step uv", "::skyward failed uv 79", "::skyward line no", "::skyward line  way"]

    assert read_progress(output) == Progress("uv", 79, ("no", " way"))


@pytest.mark.parametrize("shell", SHELLS)
def test_a_step_that_fails_ends_the_script_and_shows_the_end_of_its_log(shell: str, tmp_path: Path) -> None:
    start = script(Recipe(python="3.11")).partition("\nenvironment=")[0]
    text = f"{start}\nmany() {{ seq 100; return 7; }}\nstep ok true\nstep trouble many\nstep never true\n"
    command = ["busybox", "sh"] if shell == "busybox" else [shell]

    done = subprocess.run(
        [*command], input=text, env={**os.environ, "SKYWARD_HOME": str(tmp_path)}, capture_output=True, text=True
    )

    progress = read_progress(done.stdout.splitlines())
    assert done.returncode == 1
    assert progress is not None
    assert (progress.step, progress.status) == ("trouble", 7)
    assert progress.lines == tuple(str(n) for n in range(82, 101))


# --- versions -----------------------------------------------------------------------------------------------


def pins(image: Image) -> list[str]:
    return [str(Requirement(r)) for r in recipe(image, own_wheel()).requirements]


def here(name: str) -> str:
    return importlib.metadata.version(name).partition("+")[0]


@pytest.mark.parametrize("name", ["dask", "distributed", "cloudpickle", "tornado", "msgpack"])
def test_what_both_sides_talk_with_is_the_same_version(name: str) -> None:
    assert f"{name}=={here(name)}" in pins(Image())


def test_a_package_without_a_version_gets_the_one_that_is_installed_here() -> None:
    found = pins(Image(pip=["numpy", "scikit-learn ; python_version > '3'", "pandas>=1", "not-installed-here"]))

    assert f"numpy=={here('numpy')}" in found
    assert f'scikit-learn=={here("scikit-learn")}; python_version > "3"' in found
    assert "pandas>=1" in found
    assert "not-installed-here" in found


def test_what_a_package_needs_in_turn_is_held_to_the_versions_here() -> None:
    made = recipe(Image(pip=["scikit-learn"]), own_wheel())

    assert f"scipy=={here('scipy')}" in made.constraints
    assert f"numpy=={here('numpy')}" in made.constraints


def test_a_version_that_was_asked_for_is_not_contradicted() -> None:
    made = recipe(Image(pip=["scikit-learn", "numpy<2"]), own_wheel())

    assert "numpy<2" in made.requirements
    assert not [c for c in made.constraints if c.startswith("numpy=")]


@pytest.mark.parametrize("wanted", ["dask==2020.1.0", "Distributed<2021", "cloudpickle!=" + here("cloudpickle")])
def test_another_version_of_a_shared_package_is_refused_before_the_start(wanted: str) -> None:
    with pytest.raises(sky.SpecError, match=r"as it is installed here: both sides need the same") as caught:
        recipe(Image(pip=[wanted]), own_wheel())

    assert caught.value.option == "pip"


@pytest.mark.parametrize(("from_folder", "installer"), [(True, "pip"), (False, "pip"), (False, "conda")])
def test_a_package_from_a_folder_is_left_to_the_index(
    from_folder: bool, installer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "mine-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.2\n")
    (info / "INSTALLER").write_text(f"{installer}\n")
    if from_folder or installer == "conda":
        (info / "direct_url.json").write_text('{"url": "file:///src/mine", "dir_info": {"editable": true}}')
    monkeypatch.syspath_prepend(tmp_path)

    made = recipe(Image(pip=["mine"]), own_wheel())

    assert ("mine" if from_folder else "mine==1.2") in made.requirements
    assert [c for c in made.constraints if c.startswith("mine")] == ([] if from_folder else ["mine==1.2"])


def test_local_packages_are_installed_by_their_content(tmp_path: Path) -> None:
    wheel = pack("mine-1-py3-none-any.whl", {"mine.py": b"1"}, ("scikit-learn", "tests; extra == 'x'"))
    changed = pack(wheel.name, {"mine.py": b"2"}, wheel.requirements)
    made, other = (recipe(Image(wheels=[w]), own_wheel()) for w in (wheel, changed))

    run_function(script(made), "install_packages", tmp_path)

    assert (tmp_path / "uv").read_text().splitlines()[-1] == f"{tmp_path}/home/wheels/{wheel.digest}/{wheel.name}"
    assert made.key != other.key
    assert f"scipy=={here('scipy')}" in made.constraints
    assert described(made)[-1] == wheel.name


def test_a_local_package_that_needs_skyward_gets_it_once(tmp_path: Path) -> None:
    wheel = pack("mine-1-py3-none-any.whl", {}, ("skyward[sklearn]>=0.1", "skyward[aws]; python_version < '3'"))
    made = recipe(Image(wheels=[wheel]), own_wheel())

    done = run_function(script(replace(made, local=("ab/mine-1-py3-none-any.whl",))), "install_packages", tmp_path)

    environment = tmp_path / "home" / "envs"
    (written,) = environment.glob("*/overrides.txt")
    assert done.returncode == 0, done.stderr
    assert written.read_text().splitlines() == [
        "skyward ; sys_platform == 'never'", f"mine @ file://{tmp_path}/home/wheels/ab/mine-1-py3-none-any.whl"
    ]  # fmt: skip
    assert not [text for text in made.requirements if text.startswith(("skyward", "boto3"))]
    assert any(text.startswith("scikit-learn") for text in made.requirements)


def test_constraints_of_an_image_win_over_versions_here() -> None:
    made = recipe(Image(pip=["scikit-learn"], constraints=["numpy<2", "scipy>1"]), own_wheel())

    assert {"numpy<2", "scipy>1", f"scipy=={here('scipy')}"} <= set(made.constraints)
    assert f"numpy=={here('numpy')}" not in made.constraints


def test_packages_are_shown_without_hashes_and_passwords() -> None:
    pip = [f"idna==3.6 --hash=sha256:{'ab' * 32}", "x @ https://me:secret@host/x.whl"]
    made = recipe(Image(pip=pip, pip_extra_index_url=["https://one", "https://two"]), own_wheel())

    assert described(made)[-2:] == ("idna==3.6", "x @ https://...@host/x.whl")
    assert made.extra_index_url == "https://one https://two"


def test_skyward_travels_as_a_wheel_and_its_extras_as_what_they_need() -> None:
    made = recipe(Image(pip=["skyward[sklearn]"]), own_wheel())

    assert not [r for r in made.requirements if r.startswith("skyward")]
    assert [r for r in made.requirements if r.startswith("scikit-learn")]


@settings(max_examples=40)
@given(st.lists(requirements, max_size=4))
def test_a_recipe_is_the_same_each_time_and_keeps_every_requirement(pip: list[str]) -> None:
    made = recipe(Image(pip=pip), own_wheel())

    assert made == recipe(Image(pip=pip), own_wheel())
    assert {Requirement(p).name for p in pip} <= {Requirement(r).name for r in made.requirements}


# --- the wheel ----------------------------------------------------------------------------------------------


def test_the_wheel_holds_what_is_imported_here() -> None:
    wheel = own_wheel()
    with zipfile.ZipFile(io.BytesIO(wheel.data)) as archive:
        found = set(archive.namelist())
        bootstrap = archive.read("skyward/scripts/bootstrap.py")

    assert {"skyward/__init__.py", "skyward/node/agent.py", "skyward_joblib/__init__.py"} <= found
    assert not [name for name in found if "__pycache__" in name]
    assert bootstrap == Path(skyward.scripts.bootstrap.__file__).read_bytes()


def test_equal_content_makes_equal_wheels_with_shell_safe_names() -> None:
    first = own_wheel()
    own_wheel.cache_clear()
    second = own_wheel()

    assert first == second
    assert shlex.quote(first.name) == first.name


def test_the_wheel_is_one_that_installers_take(tmp_path: Path) -> None:
    wheel = own_wheel()
    (tmp_path / wheel.name).write_bytes(wheel.data)

    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-compile", "--no-index"]
    subprocess.run([*install, "--target", str(tmp_path / "there"), str(tmp_path / wheel.name)], check=True)

    code = "import skyward, skyward_joblib; print(skyward.__version__)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "there", capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == sky.__version__


def test_what_is_imported_without_being_installed_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def requires(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", requires)
    own_wheel.cache_clear()

    with pytest.raises(sky.PoolError, match="pip install skyward"):
        own_wheel()
