"""A machine in a box: its own root file system, processes, host name and network, with a real sshd."""

from __future__ import annotations

import contextlib
import json
import shlex
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import yaml

from tests.cloudbox.network import Network, run

_UNSHARE = ["unshare", "--mount", "--pid", "--fork", "--uts", "--net", "--kill-child=KILL", "--propagation=private"]
MTU = "1400"  # what passes through the networks that this is likely to run in
_INIT = Path(__file__).with_name("init.sh")


class Machine:
    """Boots on construction and is up, its sshd listening, when that returns.

    Parameters
    ----------
    user_data
        As cloud-init takes it: ``#cloud-config`` with `ssh_keys`, `ssh_authorized_keys`, `bootcmd`, `write_files` and
        `runcmd`, or a script that begins with ``#!``.
    user
        Who may log in.
    disk
        Size of the file system that takes what is written, as mount(8) takes it.
    baked
        A folder with environments that root's ``~/.cache/skyward`` shows, as a baked image would have them. It is not
        changed.
    shared
        A folder that is root's home, also that of other machines; None: each has its own.
    place
        An address that was taken on the network for it before; None: the next one.
    """

    def __init__(
        self,
        network: Network,
        name: str,
        user_data: str = "",
        *,
        user: str = "root",
        disk: str = "4g",
        baked: Path | None = None,
        shared: Path | None = None,
        place: tuple[str, int] | None = None,
    ) -> None:
        self.name, self.user = name, user
        self._is_gone = False
        self.network = network
        self.address, self._number = place or network.take_address()
        self._folder = network.folder / name
        self._cable = f"{network.name}-{self._number}"
        seed = self._folder / "seed"
        seed.mkdir(parents=True)
        (self._folder / "disk").mkdir()
        facts = {
            "name": name,
            "address": self.address,
            "gateway": network.gateway,
            "user": user,
            "disk": disk,
            "baked": str(baked or ""),
            "shared": str(shared or ""),
        }
        (seed / "facts").write_text("".join(f"{k}={shlex.quote(v)}\n" for k, v in facts.items()))
        _write_seed(seed, user_data)
        with (self._folder / "console").open("wb") as console:
            self._process = subprocess.Popen(
                [*_UNSHARE, "sh", str(_INIT), str(self._folder)],
                stdin=subprocess.PIPE,
                stdout=console,
                stderr=console,
                start_new_session=True,
            )
        try:
            self._plug_in()
            self._wait_for_sshd()
        except BaseException:
            self.destroy()
            raise

    def _plug_in(self) -> None:
        pid = self._process.pid
        mine = Path("/proc/self/ns/net").readlink()
        while Path(f"/proc/{pid}/ns/net").readlink() == mine:
            self._check_alive()
            time.sleep(0.001)
        # The size of packets at both ends, or a full one is dropped without a word: 3 s for every TLS handshake.
        # One of a machine before that had this address may not be quite gone.
        subprocess.run(["ip", "link", "delete", self._cable], capture_output=True)
        ends = (self._cable, "mtu", MTU, "type", "veth", "peer", "name", "eth0", "mtu", MTU, "netns", str(pid))
        run("ip", "link", "add", *ends)
        run("ip", "link", "set", self._cable, "master", self.network.name, "up")
        assert self._process.stdin is not None
        self._process.stdin.write(b"plugged in\n")
        self._process.stdin.flush()

    def _wait_for_sshd(self) -> None:
        deadline = time.monotonic() + 30
        carrier = Path(f"/sys/class/net/{self._cable}/carrier")
        while True:
            self._check_alive()
            # Who asks for its address before it is there asks again after a second.
            if carrier.read_text() == "1\n" and self._answers():
                return
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.name} has no sshd after 30 s:\n{self.console()}")
            time.sleep(0.005)

    def _answers(self) -> bool:
        import socket

        with contextlib.suppress(OSError), socket.create_connection((self.address, 22), timeout=1) as connection:
            return connection.recv(4) == b"SSH-"
        return False

    def _check_alive(self) -> None:
        if self._process.poll() is not None:
            raise RuntimeError(f"{self.name} did not boot:\n{self.console()}")

    # --- looking in -----------------------------------------------------------------------------------------

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    @property
    def pid(self) -> int:
        """The machine's first process, as seen from outside."""
        pid = self._process.pid
        return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])

    def console(self) -> str:
        with contextlib.suppress(OSError):
            return (self._folder / "console").read_text(errors="replace")
        return ""

    def run(self, command: str, *, check: bool = True) -> str:
        """Run a shell command inside, as root, not through sshd; return its output."""
        done = subprocess.run(
            ["nsenter", "--target", str(self.pid), "--all", "sh", "-c", command], capture_output=True, text=True
        )
        if check and done.returncode:
            raise RuntimeError(f"{command!r} on {self.name}: {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout

    def host_key(self) -> str:
        """Return the public host key, as a line of known_hosts holds it after the host's name."""
        return " ".join(self.run("ssh-keygen -y -f /etc/ssh/ssh_host_ed25519_key").split()[:2])

    def processes(self) -> list[str]:
        """Return the command lines of what runs inside, without the machine's own first processes."""
        own = ("sh /", "cat", "sshd:", "/usr/sbin/sshd", "ps ", "sh -c ps")
        lines = [line.strip() for line in self.run("ps -ww -eo args").splitlines()[1:]]
        return [line for line in lines if not line.startswith(own)]

    # --- what happens to machines ---------------------------------------------------------------------------

    def unplug(self) -> None:
        """Cut the network; nothing arrives or leaves, and nobody is told."""
        run("ip", "link", "set", self._cable, "down")

    def plug(self) -> None:
        run("ip", "link", "set", self._cable, "up")

    def wait(self) -> None:
        """Return when it is off, whoever has switched it off."""
        self._process.wait()

    def destroy(self) -> None:
        """Switch it off at once and remove all that it was made of. May be called twice."""
        if self._is_gone:
            return  # its address may be another machine's by now
        self._is_gone = True
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        # The kernel takes the cable away with the network namespace, a moment later.
        subprocess.run(["ip", "link", "delete", self._cable], capture_output=True)
        shutil.rmtree(self._folder, ignore_errors=True)
        self.network.free_address(self._number)


def _write_seed(seed: Path, user_data: str) -> None:
    config: dict[str, Any] = {}
    script = ""
    if user_data.startswith("#cloud-config"):
        config = yaml.safe_load(user_data) or {}
    elif user_data.startswith("#!"):
        script = user_data
    elif user_data:
        raise ValueError("user-data begins with '#cloud-config' or '#!'")
    for key, value in config.get("ssh_keys", {}).items():
        kind, _, part = key.partition("_")
        path = seed / f"ssh_host_{kind}_key{'.pub' if part == 'public' else ''}"
        path.touch(mode=0o600)
        path.write_text(value.rstrip() + "\n")
    (seed / "authorized_keys").write_text("".join(f"{k}\n" for k in config.get("ssh_authorized_keys", [])))
    lines = _commands(config, "bootcmd")
    for file in config.get("write_files", []):
        lines.append(f"mkdir -p {shlex.quote(str(Path(file['path']).parent))}")
        lines.append(f"printf %s {shlex.quote(file['content'])} > {shlex.quote(file['path'])}")
        if "permissions" in file:
            lines.append(f"chmod {file['permissions']} {shlex.quote(file['path'])}")
    lines += _commands(config, "runcmd")
    if lines:
        script = "\n".join(["#!/bin/sh", *lines, ""])
    if script:
        (seed / "script").write_text(script)


def _commands(config: dict[str, Any], key: str) -> list[str]:
    return [command if isinstance(command, str) else shlex.join(command) for command in config.get(key, [])]


def cloud_config(**facts: Any) -> str:
    """Return user-data in cloud-init's form; JSON is YAML."""
    return "#cloud-config\n" + json.dumps(facts)
