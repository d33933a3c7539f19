"""Configuration: which value holds, where it is from, and what is said of one that can't work."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import pytest

import skyward as sky
from skyward import config
from skyward.integrations import JoblibPool


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty project, which is the current folder, and a user without settings."""
    folder = tmp_path / "project"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("SKYWARD_CONFIG_DIR", str(tmp_path / "user"))
    return folder


@pytest.fixture
def user(tmp_path: Path) -> Path:
    """The user's own file, which is not there yet."""
    (tmp_path / "user").mkdir()
    return tmp_path / "user" / "config.toml"


def test_without_settings_a_pool_is_what_is_built_in() -> None:
    pool = sky.ComputePool()

    assert config.load() == config.Settings({})
    assert pool.provider == sky.Local()
    for key in set(config.KEYS) - {"provider", "region", "allocation"}:
        assert getattr(pool.spec, key) == config.KEYS[key]
    assert pool.spec.allocation == sky.Allocation.parse(config.KEYS["allocation"])


def test_argument_environment_project_user_come_in_this_order(
    project: Path, user: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    user.write_text("display = 'log'\nretries = 1\nmax_cost = 9.5\ntimeout = 10\n")
    (project / "skyward.toml").write_text("display = 'spinner'\nretries = 2\ntimeout = 20\n")
    monkeypatch.setenv("SKYWARD_DISPLAY", "quiet")
    monkeypatch.setenv("SKYWARD_TIMEOUT", "30.5")

    spec = sky.ComputePool(display="auto").spec
    settings = config.load()

    assert (spec.display, spec.timeout, spec.retries, spec.max_cost) == ("auto", 30.5, 2, 9.5)
    assert settings.get("display") == "quiet"
    sources = {key: settings.source(key) for key in ("timeout", "retries", "max_cost", "selection")}
    assert sources == {
        "timeout": "SKYWARD_TIMEOUT",
        "retries": str(project / "skyward.toml"),
        "max_cost": str(user),
        "selection": "built in",
    }


def test_an_argument_of_none_takes_a_limit_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SKYWARD_MAX_PRICE", "0.5")

    assert sky.ComputePool().spec.max_price == 0.5
    assert sky.ComputePool(max_price=None).spec.max_price is None


def test_the_nearest_file_counts_and_nothing_beyond_the_repository(project: Path) -> None:
    (project / "skyward.toml").write_text("display = 'log'\n")
    inner = project / "a" / "b"
    inner.mkdir(parents=True)
    (project / "a" / "pyproject.toml").write_text("[tool.ruff]\nline-length = 100\n")

    assert config.project_file(inner) == project / "skyward.toml"
    (project / "a" / "pyproject.toml").write_text("[tool.skyward]\ndisplay = 'quiet'\n")
    assert config.load(inner).get("display") == "quiet"
    (inner / ".git").mkdir()
    assert config.project_file(inner) is None


def test_skyward_toml_comes_before_pyproject_toml_in_one_folder(project: Path) -> None:
    (project / "pyproject.toml").write_text("[tool.skyward]\nretries = 7\n")
    (project / "skyward.toml").write_text("display = 'quiet'\n")

    settings = config.load()

    assert (settings.get("display"), settings.get("retries")) == ("quiet", 3)


# --- provider and region ------------------------------------------------------------------------------------


def test_provider_and_region_make_a_cloud(project: Path) -> None:
    (project / "skyward.toml").write_text("provider = 'aws'\nregion = 'eu-west-1'\n")

    assert sky.ComputePool().provider == (sky.AWS(region="eu-west-1"),)
    assert sky.ComputePool("aws").provider == (sky.AWS(region="eu-west-1"),)
    assert sky.ComputePool(sky.AWS()).provider == (sky.AWS(),)
    assert sky.ComputePool("local").provider == sky.Local()


def test_several_providers_have_a_region_each(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (project / "skyward.toml").write_text("region = { aws = 'eu-west-1', verda = 'FIN-02' }\n")
    monkeypatch.setenv("SKYWARD_PROVIDER", "aws, verda,digitalocean")

    assert sky.ComputePool().provider == (sky.AWS("eu-west-1"), sky.Verda("FIN-02"), sky.DigitalOcean())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("provider = 'digitalocan'", ["provider='digitalocan'", "did you mean 'digitalocean'"]),
        ("provider = 'digitalocean'\nregion = 'us-east-1'", ["region='us-east-1'", "'nyc1'"]),
        ("provider = 'aws'\nregion = { asw = 'us-east-1' }", ["'asw'", "did you mean 'aws'"]),
        ("provider = 'digitalocean'\nallocation = 'always-spot'", ["no spot machines"]),
    ],
)
def test_what_only_a_provider_can_refuse_is_traced_to_its_file(project: Path, text: str, words: list[str]) -> None:
    (project / "skyward.toml").write_text(text)

    with pytest.raises(sky.SpecError) as info:
        sky.ComputePool()

    option = info.value.option  # type: ignore[attr-defined]
    assert f"{option} is from {project / 'skyward.toml'}" in str(info.value)
    assert all(word in str(info.value) for word in words)


def test_a_bad_argument_is_not_blamed_on_the_configuration(project: Path) -> None:
    (project / "skyward.toml").write_text("display = 'quiet'\nretries = 1\n")

    with pytest.raises(sky.SpecError) as info:
        sky.ComputePool(display="loud")  # type: ignore[arg-type]

    assert "skyward.toml" not in str(info.value)


# --- values that can't work ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "option", "accepted"),
    [
        ("display = 'quite'", "display", "did you mean 'quiet'"),
        ("maxprice = 1", "maxprice", "did you mean 'max_price'"),
        ("nodes = 4", "nodes", "one of the keys provider, region"),
        ("max_price = 'cheap'", "max_price", "USD per hour greater than 0"),
        ("max_price = -1", "max_price", "USD per hour greater than 0"),
        ("retries = 1.5", "retries", "an integer >= 0"),
        ("retries = true", "retries", "an integer >= 0"),
        ("timeout = inf", "timeout", "seconds greater than 0"),
        ("allocation = 1.5", "allocation", "a share from 0 to 1"),
        ("selection = 'best'", "selection", "'cheapest'"),
        ("provider = []", "provider", "a provider's name"),
        ("provider = 3", "provider", "a provider's name"),
        ("region = ''", "region", "a region such as"),
    ],
)
def test_a_bad_value_is_told_with_its_file(project: Path, text: str, option: str, accepted: str) -> None:
    (project / "skyward.toml").write_text(text)

    with pytest.raises(sky.SpecError) as info:
        sky.ComputePool()

    assert str(info.value).startswith(f"{project / 'skyward.toml'}: {option}=")
    assert accepted in str(info.value)
    assert info.value.option == option  # type: ignore[attr-defined]


def test_all_bad_values_are_told_at_once(project: Path, user: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    user.write_text("not toml")
    (project / "skyward.toml").write_text("display = 'x'\nspeed = 3\n")
    monkeypatch.setenv("SKYWARD_RETRIES", "many")

    with pytest.raises(sky.SpecError, match="4 settings can't work") as info:
        config.load()

    lines = str(info.value).splitlines()
    assert lines[1].startswith(f"  {user} can't be read: ")
    assert lines[-1].startswith("  SKYWARD_RETRIES='many' is invalid: expected an integer")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("skyward.toml", b"display = "),
        ("skyward.toml", b"\xff\xfe"),
        ("pyproject.toml", b"[tool.skyward\n"),
        ("pyproject.toml", b"[tool]\nskyward = 3\n"),
    ],
)
def test_a_file_that_cannot_be_read_breaks_pools_and_not_the_import(project: Path, name: str, content: bytes) -> None:
    (project / name).write_bytes(content)

    with pytest.raises(sky.SpecError) as info:
        sky.ComputePool()
    ran = subprocess.run([sys.executable, "-c", "import skyward; print(skyward.ComputePool)"], capture_output=True)

    assert str(project / name) in str(info.value)
    assert ran.returncode == 0


def test_somebody_elses_broken_file_is_none_of_our_business(project: Path) -> None:
    (project / "pyproject.toml").write_text("[tool.ruff")

    assert config.load() == config.Settings({})


# --- who else makes pools -----------------------------------------------------------------------------------


def _decorated(**options: Any) -> Any:
    return sky.pool(**options)._make()


def _of_executor(**options: Any) -> Any:
    executor: Executor = sky.Executor(**options)
    return executor.pool  # type: ignore[attr-defined]


@pytest.mark.parametrize("make", [sky.ComputePool, _decorated, _of_executor, JoblibPool])
def test_whoever_makes_a_pool_has_the_same_defaults(make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SKYWARD_PROVIDER", "verda")
    monkeypatch.setenv("SKYWARD_DISPLAY", "quiet")
    monkeypatch.setenv("SKYWARD_ALLOCATION", "0.5")

    pool = make(retries=0)
    other = make(provider="local", display="log")

    assert pool.provider == (sky.Verda(),)
    assert (pool.spec.display, pool.spec.retries) == ("quiet", 0)
    assert pool.spec.allocation == sky.Allocation.Percent(0.5)
    assert (other.provider, other.spec.display) == (sky.Local(), "log")


def test_the_docs_have_every_key_and_what_is_built_in() -> None:
    page = (Path(__file__).parent.parent / "docs" / "configuration.md").read_text(encoding="utf-8")
    rows = [line.strip("|").split(" | ") for line in page.splitlines() if line.startswith("| `")]

    documented = {cells[0].strip(" `"): cells[-1].strip(" `") for cells in rows}

    assert list(documented) == list(config.KEYS)
    for key, value in config.KEYS.items():
        shown = f'"{value}"' if isinstance(value, str) else "none" if value is None else str(value)
        assert documented[key].startswith(shown)
