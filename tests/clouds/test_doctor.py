"""`skyward doctor` with accounts at emulated clouds: credentials that work, that don't, and what accounts may have."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from skyward.cli import main
from tests.clouds.emulated import NAMES, Emulated

_SECRETS = {"aws": "AWS_SECRET_ACCESS_KEY", "digitalocean": "DIGITALOCEAN_TOKEN", "verda": "VERDA_CLIENT_SECRET"}


@pytest.fixture(autouse=True)
def _nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in [v for v in os.environ if v.startswith(("AWS_", "DIGITALOCEAN_", "VERDA_"))]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)


@pytest.fixture(params=NAMES)
def account(request: pytest.FixtureRequest, emulate: Callable[..., Emulated]) -> Emulated:
    """An account at each cloud in turn, on which no machine boots."""
    return emulate(request.param, boots=False)


def doctor(name: str, *, status: int) -> list[dict[str, Any]]:
    """Return what is said of a cloud."""
    result = CliRunner().invoke(main, ["doctor", "--json"])
    secrets = [os.environ[v] for v in _SECRETS.values() if v in os.environ]
    assert result.exit_code == status, result.output
    assert not any(secret in result.output for secret in secrets)
    return [c for c in json.loads(result.stdout)["checks"] if (c["topic"], c["name"]) == ("clouds", name)]


def test_credentials_that_work_are_told_with_where_they_are_from(account: Emulated) -> None:
    first, *rest = doctor(account.name, status=0)

    found = {"aws": "AWS_SECRET_ACCESS_KEY", "digitalocean": "DIGITALOCEAN_TOKEN", "verda": "VERDA_CLIENT_ID"}
    limits = {"aws": "quotas of vCPUs in us-east-1", "digitalocean": "droplets: ", "verda": "balance: 100.00 usd"}
    assert first["status"] == "ok"
    assert first["says"].startswith("credentials work: ")
    assert found[account.name] in first["says"]
    assert any(check["says"].startswith(limits[account.name]) for check in rest)


def test_credentials_that_are_refused_are_a_problem(account: Emulated, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = "AWS_ACCESS_KEY_ID" if account.name == "aws" else _SECRETS[account.name]
    monkeypatch.setenv(wrong, "AKIAWRONG")

    (check,) = doctor(account.name, status=1)

    assert check["status"] == "problem"
    assert _SECRETS[account.name] in check["says"]


def test_quotas_of_vcpus_are_told_and_no_less_when_some_may_not_be_read(
    emulate: Callable[..., Emulated], monkeypatch: pytest.MonkeyPatch
) -> None:
    from moto.servicequotas.exceptions import NoSuchResource
    from moto.servicequotas.models import ServiceQuotasBackend

    def quota(_: Any, service_code: str, quota_code: str) -> dict[str, Any]:
        if quota_code == "L-34B43A08":
            raise NoSuchResource
        return {"ServiceCode": service_code, "QuotaCode": quota_code, "Value": {"L-1216C47A": 640.0}.get(quota_code, 8)}

    emulate("aws", boots=False)
    monkeypatch.setattr(ServiceQuotasBackend, "get_service_quota", quota)

    said = [check["says"] for check in doctor("aws", status=0)]

    assert "standard on-demand in us-east-1: 640 vCPUs" in said
    assert "P spot in us-east-1: 8 vCPUs" in said
    assert "quotas of vCPUs in us-east-1 could not be read: NoSuchResourceException" in said
    assert not any("standard spot" in line for line in said)


def test_a_token_that_may_not_see_the_account_is_good_enough(emulate: Callable[..., Emulated]) -> None:
    emulate("digitalocean", boots=False).faults.forbidden.add(("GET", "/v2/account"))

    first, second = doctor("digitalocean", status=0)

    assert first["status"] == "ok"
    assert second["status"] == "note"
    assert "account:read" in second["says"]


def test_a_balance_that_is_used_up_is_a_problem(emulate: Callable[..., Emulated]) -> None:
    emulate("verda", boots=False).faults.has_funds = False

    *_, last = doctor("verda", status=1)

    assert last["status"] == "problem"
    assert "the balance is used up" in last["says"]
