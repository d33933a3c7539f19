"""`sky.SSH`: what it accepts, what it refuses, and what it makes of hosts. No machine is needed."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import skyward as sky
from skyward.spec.image import Image


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "key").write_text("a key")
    (tmp_path / "known").write_text("")
    return tmp_path


def test_a_host_may_name_its_user_and_port() -> None:
    machines = sky.SSH(["a", "b@c", "d@e.example:2222", "[fe80::1]:22"], user="me").machines(4)

    found = [(m.login.user, m.login.host, m.login.port) for m in machines]
    assert found == [("me", "a", None), ("b", "c", None), ("d", "e.example", 2222), ("me", "fe80::1", 22)]
    assert all(m.outlives_pool and m.provider == "ssh" for m in machines)
    assert [m.id for m in machines] == ["a", "b@c", "d@e.example:2222", "[fe80::1]:22"]


def test_an_ipv6_address_needs_brackets_only_before_a_port() -> None:
    machines = sky.SSH(["::1", "me@fe80::1%eth0", "me@[fd00::2]:2222"]).machines(3)

    found = [(m.login.user, m.login.host, m.login.port) for m in machines]
    assert found == [(None, "::1", None), ("me", "fe80::1%eth0", None), ("me", "fd00::2", 2222)]
    assert [str(m.login) for m in machines] == [m.id for m in machines]


def test_addresses_are_networks_or_single_addresses() -> None:
    assert sky.SSH("a", addresses="10.0.0.0/8").addresses == ("10.0.0.0/8",)
    assert sky.SSH("a", addresses=["10.1.2.3/24", "fd00::1"]).addresses == ("10.1.2.0/24", "fd00::1/128")


@pytest.mark.parametrize("addresses", ["eth0", ["10.0.0.0/33"], [None], 10])
def test_what_is_no_network_is_refused(addresses: Any) -> None:
    with pytest.raises(sky.SpecError, match=r"addresses=.*networks or addresses such as '10\.0\.0\.0/8'") as caught:
        sky.SSH("a", addresses=addresses)

    assert caught.value.option == "addresses"


def test_one_host_needs_no_list() -> None:
    assert sky.SSH("gpu-box") == sky.SSH(["gpu-box"])


def test_key_and_known_hosts_are_found_from_wherever_the_pool_is_entered(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(files)
    monkeypatch.setenv("HOME", str(files))

    provider = sky.SSH("a", key="key", known_hosts="~/known")

    assert (provider.key, provider.known_hosts) == (str(files / "key"), str(files / "known"))


@pytest.mark.parametrize(
    "hosts",
    [
        [], "", "two words", "a:0", "a:65536", "a:ssh", "-oProxyCommand=reboot", "a@-b", "a@", "a:22:22", "a b@::1",
        [1], "a\nb",
    ],
)  # fmt: skip
def test_what_is_no_host_is_refused(hosts: Any) -> None:
    with pytest.raises(sky.SpecError, match=r"user@host:port"):
        sky.SSH(hosts)


@pytest.mark.parametrize(
    "hosts", [["a", "a"], ["a", "b@A"], ["a:22", "a"], ["[::1]", "[::1]:22"], ["a:2222", "a:2222"]]
)
def test_a_host_that_is_named_twice_is_refused(hosts: list[str]) -> None:
    with pytest.raises(sky.SpecError, match=r"each host once, but .* is listed twice") as caught:
        sky.SSH(hosts)

    assert caught.value.option == "hosts"


def test_ports_tell_machines_behind_one_address_apart() -> None:
    assert len(sky.SSH(["a:2201", "a:2202"]).machines(2)) == 2


@pytest.mark.parametrize("option", ["key", "known_hosts"])
def test_a_file_that_is_not_there_is_refused(option: str, files: Path) -> None:
    for path in (files / "missing", files):
        with pytest.raises(sky.SpecError, match=rf"{option}=.*the path of a file that exists") as caught:
            sky.SSH("a", **{option: path})
        assert caught.value.option == option


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_a_key_that_cannot_be_read_is_refused(files: Path) -> None:
    (files / "key").chmod(0)

    with pytest.raises(sky.SpecError, match=r"can be read"):
        sky.SSH("a", key=files / "key")


@pytest.mark.parametrize("user", ["", "a b", "-x", "a;b", 7])
def test_what_is_no_user_is_refused(user: Any) -> None:
    with pytest.raises(sky.SpecError, match=r"user=.*the name of a user"):
        sky.SSH("a", user=user)


def test_all_that_is_wrong_is_told_at_once(files: Path) -> None:
    with pytest.raises(sky.SpecError, match=r"3 options can't work") as caught:
        sky.SSH(["a", "a"], user="a b", key=files / "missing")

    assert [e.option for e in caught.value.errors] == ["hosts", "user", "key"]


def test_more_nodes_than_hosts_are_refused_before_anything_starts() -> None:
    with pytest.raises(sky.SpecError, match=r"nodes=3 is invalid: expected up to 2, as many as sky.SSH was given"):
        sky.ComputePool(sky.SSH(["a", "b"]), nodes=3)


def test_a_pool_takes_the_first_hosts_and_grows_into_the_others() -> None:
    provider = sky.SSH(["a", "b", "c"])

    assert [m.id for m in provider.machines(2)] == ["a", "b"]
    assert [m.id for m in provider.machines(1, skip=["a", "b"])] == ["c"]
    with pytest.raises(sky.NoMatchingInstanceError, match=r"has 1 unused hosts, but 2 are needed"):
        provider.machines(2, skip=["a", "b"])


@pytest.mark.parametrize("option", [{"machine": "p5.48xlarge"}, {"volume": sky.S3Volume("/data", "some-bucket")}])
def test_hosts_are_what_they_are(option: dict[str, Any]) -> None:
    with pytest.raises(sky.SpecError, match=rf"{next(iter(option))}=.*with sky.SSH"):
        sky.ComputePool(sky.SSH("a"), **option)


def test_a_missing_file_to_ship_is_refused_before_anything_starts(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(files)
    sky.ComputePool(sky.SSH("a"), image=Image(include=["key", str(files)]))

    with pytest.raises(sky.SpecError, match=r"include='nothing.csv' is invalid: .* that can be read in ") as caught:
        sky.ComputePool(sky.SSH("a"), image=Image(include=["key", "nothing.csv"]))

    assert caught.value.option == "include"


def test_a_provider_survives_pickling_and_tells_no_secret(files: Path) -> None:
    provider = sky.SSH(["a", "b@c:1"], user="me", key=files / "key")

    assert pickle.loads(pickle.dumps(provider)) == provider
    assert str(files) not in repr(provider.machines(1))


@given(st.text(max_size=30))
def test_a_host_is_refused_or_read_without_loss(text: str) -> None:
    try:
        (machine,) = sky.SSH(text).machines(1)
    except sky.SpecError:
        return
    login = machine.login
    host = f"[{login.host}]" if ":" in login.host else login.host
    again = (f"{login.user}@" if login.user else "") + host + (f":{text.rpartition(':')[2]}" if login.port else "")
    assert text in (again, again.replace(host, f"[{host}]"), again.replace(host, login.host))
    assert not any(c.isspace() for c in login.host)
    assert not login.host.startswith("-")
