"""The private network of cloudbox machines: a bridge with addresses of its own and a way to the package index."""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

_STATE = Path("/run/skyward-cloudbox")
_TOOLS = ("ip", "nft", "unshare", "nsenter", "/usr/sbin/sshd")


def why_not() -> str | None:
    """Return why this host can't boot cloudbox machines, or None when it can."""
    if sys.platform != "linux":
        return "cloudbox machines need Linux: they are made of namespaces"
    if os.geteuid() != 0:
        return "cloudbox machines need root: they have networks and file systems of their own"
    missing = [tool for tool in _TOOLS if shutil.which(tool, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None]
    if missing:
        return f"cloudbox machines need {', '.join(missing)}: apt-get install iproute2 nftables openssh-server"
    return None


def run(*command: str, text: str | None = None) -> None:
    done = subprocess.run(command, capture_output=True, text=True, input=text)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stdout}{done.stderr}")


class Network:
    """A bridge ``10.77.<n>.0/24`` on this host, from which machines reach only DNS, HTTP and HTTPS outside.

    What a process has left behind that was killed goes when the next network is made.
    """

    def __init__(self) -> None:
        _STATE.mkdir(exist_ok=True)
        self._numbers: set[int] = set()
        self._last = 1
        self._lock = threading.Lock()
        self._number, self._held = _take_number()
        self.name = f"skybox{self._number}"
        self.folder = _STATE / self.name
        self.subnet = ipaddress.ip_network(f"10.77.{self._number}.0/24")
        self.gateway = str(self.subnet[1])
        _remove(self.name)
        self.folder.mkdir()
        run("ip", "link", "add", self.name, "type", "bridge")
        run("ip", "address", "add", f"{self.gateway}/24", "dev", self.name)
        run("ip", "link", "set", self.name, "up")
        run("nft", "-f", "-", text=self._rules())
        Path("/proc/sys/net/ipv4/ip_forward").write_text("1")

    def _rules(self) -> str:
        return f"""
        table ip {self.name} {{
            chain out {{
                type nat hook postrouting priority srcnat;
                ip saddr {self.subnet} oifname != "{self.name}" masquerade
            }}
            chain through {{
                type filter hook forward priority filter;
                iifname "{self.name}" oifname "{self.name}" accept
                iifname "{self.name}" meta l4proto {{ tcp, udp }} th dport {{ 53, 80, 443 }} accept
                iifname "{self.name}" drop
            }}
        }}
        """

    def take_address(self) -> tuple[str, int]:
        with self._lock:
            # The one that was free for longest: others may still have its last owner's host key and hardware address.
            order = [*range(self._last + 1, 255), *range(2, self._last + 1)]
            number = self._last = next(n for n in order if n not in self._numbers)
            self._numbers.add(number)
        return str(self.subnet[number]), number

    def free_address(self, number: int) -> None:
        with self._lock:
            self._numbers.discard(number)

    def close(self) -> None:
        _remove(self.name)
        os.close(self._held)


def _take_number() -> tuple[int, int]:
    """Find a number that no living process holds; the lock on its file ends with the process that has it."""
    for number in range(256):
        held = os.open(_STATE / f"{number}.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC)
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return number, held
        os.close(held)
    raise RuntimeError("256 networks of cloudbox machines are in use")


def _remove(name: str) -> None:
    for command in (["ip", "link", "delete", name], ["nft", "delete", "table", "ip", name]):
        subprocess.run(command, capture_output=True)
    shutil.rmtree(_STATE / name, ignore_errors=True)
