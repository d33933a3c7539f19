"""`skyward doctor` where no cloud is used; with clouds it is tried in tests/clouds."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from skyward import providers
from skyward.cleanup import journal
from skyward.cli import main
from skyward.errors import CredentialsError
from skyward.providers.accounts import account
from tests.waiting import wait_until


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A computer with nothing on it: no credentials, keys, settings or pools."""
    for name in ("CONFIG", "DATA"):
        monkeypatch.setenv(f"SKYWARD_{name}_DIR", str(tmp_path / name.lower()))
    for variable in [v for v in os.environ if v.startswith(("AWS_", "DIGITALOCEAN_", "VERDA_"))]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path / "project")
    return tmp_path


def doctor(*, ok: bool = True) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Return the checks by topic and name."""
    result = CliRunner().invoke(main, ["doctor", "--json"])
    told = json.loads(result.stdout)
    assert (result.exit_code, told["ok"]) == (0 if ok else 1, ok), result.output
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for check in told["checks"]:
        found.setdefault((check["topic"], check["name"]), []).append(check)
    return found


def test_clouds_that_nobody_uses_are_no_problem() -> None:
    checks = doctor()

    assert [checks["clouds", name][0]["status"] for name in ("aws", "digitalocean", "verda")] == ["unused"] * 3
    assert "DIGITALOCEAN_TOKEN" in checks["clouds", "digitalocean"][0]["says"]
    assert checks["configuration", "provider"][0]["says"] == "'local' (built in)"
    assert checks["versions", "dask"][0]["says"] == importlib.metadata.version("dask")
    assert checks["ssh", "known_hosts"][0]["status"] == "unused"
    assert checks["record", "journal"][0]["status"] == "ok"


def test_people_are_told_the_same() -> None:
    result = CliRunner().invoke(main, ["doctor"])

    assert result.exit_code == 0
    assert "'local' (built in)" in result.output
    assert result.output.endswith("\nno problems\n")


def test_the_configured_provider_needs_credentials(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "project" / "skyward.toml").write_text("provider = ['verda', 'aws']\nregion = { verda = 'FIN-02' }\n")

    checks = doctor(ok=False)

    assert [checks["clouds", n][0]["status"] for n in ("aws", "digitalocean", "verda")] == [
        "problem", "unused", "problem"
    ]  # fmt: skip
    assert str(folder / "project" / "skyward.toml") in checks["configuration", "region"][0]["says"]


def test_a_setting_that_cannot_work_is_a_problem(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "project" / "skyward.toml").write_text("display = 'quite'\nspeed = 3\n")

    checks = doctor(ok=False)

    assert "did you mean 'quiet'" in checks["configuration", "display"][0]["says"]
    assert checks["configuration", "speed"][0]["status"] == "problem"
    (folder / "project" / "skyward.toml").write_text("provider = 'asw'\n")
    refused = doctor(ok=False)["configuration", "provider"][-1]
    assert "did you mean 'aws'" in refused["says"]
    assert str(folder) in refused["advice"]


def test_no_secret_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VERDA_API_KEY", "5ecret-without-a-colon")

    result = CliRunner().invoke(main, ["doctor"])

    assert result.exit_code == 1
    assert "VERDA_API_KEY is not 'id:secret'" in result.output
    assert "5ecret" not in result.output


def test_a_journal_that_cannot_be_written_is_a_problem(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "file").write_text("")
    monkeypatch.setenv("SKYWARD_DATA_DIR", str(folder / "file" / "data"))

    (check,) = doctor(ok=False)["record", "journal"]

    assert check["status"] == "problem"
    assert "SKYWARD_DATA_DIR" in check["advice"]


def test_pools_without_an_owner_are_told_with_what_ends_them() -> None:
    entry = journal.open_entry("0123abcd", provider="ssh", expires=0)
    journal.update(replace(entry, pid_started=entry.pid_started - 3600))

    (check,) = doctor()["record", "pools"]

    assert (check["status"], check["advice"]) == ("note", "skyward down 0123abcd")


def test_versions_that_do_not_fit_are_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "2024.1.0" if name == "distributed" else real(name)
    )

    checks = doctor(ok=False)

    assert "skyward needs distributed>=2025.1" in checks["versions", "distributed"][0]["says"]
    assert "are not of one release" in checks["versions", "dask"][-1]["says"]


def test_a_missing_sdk_is_told_with_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIGITALOCEAN_TOKEN", "dop_v1_0123")
    monkeypatch.setitem(sys.modules, "pydo", None)

    (check,) = doctor()["clouds", "digitalocean"]

    assert check["status"] == "unused"
    assert "pip install 'skyward[digitalocean]'" in check["says"]
    assert "dop_v1" not in check["says"]


def test_an_agent_with_keys_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("ssh-agent") is None:
        pytest.skip("there is no ssh-agent here")
    key = folder / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    with subprocess.Popen(["ssh-agent", "-D", "-a", str(folder / "agent")], stdout=subprocess.DEVNULL) as agent:
        try:
            monkeypatch.setenv("SSH_AUTH_SOCK", str(folder / "agent"))
            wait_until((folder / "agent").exists)
            empty = doctor()["ssh", "agent"][0]
            subprocess.run(["ssh-add", "-q", str(key)], check=True)
            with_key = doctor()["ssh", "agent"][0]
        finally:
            agent.terminate()
    agent.wait()
    dead = doctor()["ssh", "agent"][0]

    assert (empty["status"], with_key["says"], dead["status"]) == ("note", "1 key", "note")
    assert "no agent answers" in dead["says"]


def test_every_cloud_has_accounts_that_can_be_looked_at() -> None:
    for cloud in providers.clouds():
        with pytest.raises(CredentialsError):
            account(cloud)
