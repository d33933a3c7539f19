"""Login shells of all kinds, start files that print and set options, and logins that run no commands."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import skyward as sky
from skyward.cluster import ssh
from skyward.providers.base import Login
from tests.cloudbox import Machine
from tests.machines.conftest import IMAGE, Site

ODD = r"""'it'"'"'s' '!!' '\' '$HOME `x` {a,b} ~ * "q" é %s'"""


@pytest.fixture(autouse=True)
def _own_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SKYWARD_DATA_DIR", str(tmp_path / "data"))


@pytest.fixture(scope="module")
def booted(boot: Callable[[int], list[Machine]]) -> Machine:
    return boot(1)[0]


@pytest.fixture
def machine(site: Site, booted: Machine) -> Iterator[Machine]:
    """A machine whose logins print something whichever shell they start, and set what trips other commands up."""
    for path in (".bashrc", ".zshenv", ".cshrc", ".config/fish/config.fish"):
        booted.run(f"mkdir -p /root/.config/fish; printf '%s\\n' 'echo Welcome to {path}' > /root/{path}")
    booted.run("printf '%s\\n' 'set -eC' 'umask 777' 'echo to stderr >&2' >> /root/.bashrc")
    booted.run("printf '%s\\n' 'setopt noclobber; umask 777' >> /root/.zshenv")
    booted.run("printf '%s\\n' 'set noclobber; umask 777' >> /root/.cshrc")
    booted.run("echo 'echo from rc' > /root/.ssh/rc")
    booted.run("cp /root/.ssh/authorized_keys /root/.ssh/plain")
    yield booted
    booted.run("usermod -s /bin/bash root; mv /root/.ssh/plain /root/.ssh/authorized_keys")
    booted.run("rm -rf /root/.ssh/rc /root/.bashrc /root/.zshenv /root/.cshrc /root/.config/fish")


def with_shell(machine: Machine, path: str) -> None:
    if not Path(path).exists():
        pytest.skip(f"{path} is not installed")
    machine.run(f"usermod -s {path} root")


def with_command(machine: Machine, command: str) -> None:
    """Run `command` in place of what a login asks for, and forward nothing."""
    keys = Path(f"/proc/{machine.pid}/root/root/.ssh/authorized_keys")
    quoted = command.replace('"', '\\"')
    keys.write_text(f'no-port-forwarding,command="{quoted}" {keys.with_name("plain").read_text()}')


def assert_clean(machine: Machine) -> None:
    assert machine.processes() == []
    assert machine.run("ls -d /tmp/skyward-* 2> /dev/null || true") == ""


def ask(site: Site, machine: Machine, command: str, given: bytes = b"") -> tuple[ssh.Completed, list[str]]:
    """Run a command both ways: as a whole and line by line."""
    lines: list[str] = []

    async def ask() -> ssh.Completed:
        link = ssh.Link(
            Login(host=machine.address, user="root", key=str(site.key), known_hosts=str(site.known_hosts))
        )
        try:
            await link.lines(command, lines.append)
            return await link.run(command, input=given)
        finally:
            await link.close()

    return asyncio.run(ask()), lines


SHELLS = ["/bin/sh", "/bin/bash", "/usr/bin/zsh", "/bin/tcsh", "/usr/bin/fish"]


@pytest.mark.parametrize("login_shell", SHELLS)
def test_a_command_means_the_same_in_every_login_shell(site: Site, machine: Machine, login_shell: str) -> None:
    with_shell(machine, login_shell)

    done, lines = ask(site, machine, f"printf '%s\\n' {ODD}; cat; echo bad >&2; (exit 7)", b"\0in\n")

    said = ["it's", "!!", "\\", '$HOME `x` {a,b} ~ * "q" é %s']
    assert done == ssh.Completed(7, "\n".join([*said, "\0in\n"]), "bad\n")
    assert lines == [*said, "bad"]


@pytest.mark.parametrize("login_shell", SHELLS[2:])
def test_a_pool_works_whatever_the_login_shell_is(site: Site, machine: Machine, login_shell: str) -> None:
    with_shell(machine, login_shell)

    with sky.ComputePool(site.provider(machine), image=IMAGE, display="quiet") as pool:
        assert sky.compute(socket.gethostname)() >> pool == machine.name

    assert_clean(machine)


def test_a_pool_works_behind_a_command_that_prints_and_ends_otherwise(site: Site, machine: Machine) -> None:
    with_command(machine, 'echo before; echo running $SSH_ORIGINAL_COMMAND; eval "$SSH_ORIGINAL_COMMAND"; echo; exit 3')

    with sky.ComputePool(site.provider(machine), image=IMAGE, display="quiet") as pool:
        assert sky.compute(socket.gethostname)() >> pool == machine.name

    assert_clean(machine)


@pytest.mark.parametrize(
    ("login_shell", "command", "printed"),
    [
        ("/usr/sbin/nologin", None, "This account is currently not available."),
        ("/bin/false", None, "It printed nothing"),
        ("/bin/bash", "echo This key may only look; exit 1", "This key may only look"),
        ("/bin/bash", "internal-sftp", "It printed"),
    ],
)
def test_a_login_that_runs_no_commands_is_named_at_once(
    site: Site, machine: Machine, login_shell: str, command: str | None, printed: str
) -> None:
    with_shell(machine, login_shell)
    if command:
        with_command(machine, command)

    with (
        pytest.raises(sky.BootstrapError, match="accepts the login but runs no commands") as caught,
        sky.ComputePool(site.provider(machine), image=IMAGE, display="quiet"),
    ):
        pass

    assert caught.value.step == "ssh"
    assert "login shell" in str(caught.value)
    assert "ForceCommand" in str(caught.value)
    assert printed in str(caught.value)


def test_what_a_login_prints_is_in_the_log_of_a_failed_start(site: Site, machine: Machine) -> None:
    image = sky.Image(pip=["skyward-no-such-package"])

    with (
        pytest.raises(sky.BootstrapError) as caught,
        sky.ComputePool(site.provider(machine), image=image, display="quiet"),
    ):
        pass

    assert caught.value.log is not None
    assert "Welcome to .bashrc" in Path(caught.value.log).read_text()
    assert "Welcome" not in str(caught.value)
