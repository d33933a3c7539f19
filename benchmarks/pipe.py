"""A link with delay and limited rate, through which TCP connections lead: a separate process.

Each direction of the link is one queue for all connections: bytes go through it in the order in which they come, at
its rate, and arrive after its delay. Delay does not lower the rate. A connection has so many bytes in a direction, at
most, and then the sender has to wait: what the link itself holds, twice, and 64 kB. A new connection costs a round
trip. Packets aren't modelled: nothing is lost, there is no slow start, and headers don't count.

As a program (`python benchmarks/pipe.py DELAY_S BYTES_PER_S`) it answers a line on stdin with one on stdout:
``open NAME HOST PORT`` with the port that leads there, ``carried NAME`` with the bytes that the connections of that
name have sent and received. It ends with its stdin.
"""

from __future__ import annotations

import contextlib
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from typing import Self

_PIECE = 16_384
_SLACK = 64_000
_RECEIVE_BUFFER = 1 << 18


class Link:
    """Starts the process and talks to it; a context manager that ends it.

    Parameters
    ----------
    delay_s
        Seconds that bytes take each way.
    rate
        Bytes per second each way.
    """

    def __init__(self, delay_s: float, rate: float) -> None:
        self.round_trip_s, self.rate = 2 * delay_s, rate
        self._lock = threading.Lock()
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(delay_s), str(rate)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is not for it: pools are closed through it
        )

    def open(self, name: str, host: str, port: int) -> int:
        """Return a port of 127.0.0.1 that leads to this one; `name` is what its bytes are counted under."""
        return int(self._ask(f"open {name} {host} {port}"))

    def carried(self, name: str) -> tuple[int, int]:
        """Return the bytes that connections of this name have sent and received."""
        sent, received = self._ask(f"carried {name}").split()
        return int(sent), int(received)

    def echo_s(self) -> float:
        """Return the seconds that a byte takes there and back, the median of 50: more than promised on a busy host."""
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = self.open("echo", *server.getsockname())
            with socket.create_connection(("127.0.0.1", port)) as near, server.accept()[0] as far:
                return statistics.median(_echo_s(near, far) for _ in range(50))

    def _ask(self, line: str) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._lock:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
            if not (answer := self._process.stdout.readline()):
                raise ConnectionError("the process of the link has ended")
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()


def _echo_s(near: socket.socket, far: socket.socket) -> float:
    started = time.perf_counter()
    near.sendall(b"?")
    far.sendall(far.recv(1))
    near.recv(1)
    return time.perf_counter() - started


class Direction:
    """One direction of the link, shared by all connections."""

    def __init__(self, delay_s: float, rate: float) -> None:
        self.delay_s, self.rate = delay_s, rate
        self.most = int(2 * delay_s * rate) + _SLACK
        self.carried: Counter[str] = Counter()
        self._free_at = 0.0
        self._lock = threading.Lock()

    def enter(self, name: str, size: int) -> float:
        """Return when the last of these bytes arrives at the other end."""
        with self._lock:
            self.carried[name] += size
            self._free_at = max(self._free_at, time.monotonic()) + size / self.rate
            return self._free_at + self.delay_s


class Flow:
    """What one connection sends in one direction: two threads, with the bytes on their way between them."""

    def __init__(self, name: str, direction: Direction, source: socket.socket, target: socket.socket) -> None:
        self._name, self._direction = name, direction
        self._source, self._target = source, target
        self._on_the_way: deque[tuple[float, bytes]] = deque()
        self._size = 0
        self._changed = threading.Condition()
        for work in (self._take, self._give):
            threading.Thread(target=work, daemon=True).start()

    def _take(self) -> None:
        data = b"..."
        while data:
            with self._changed:
                self._changed.wait_for(lambda: self._size < self._direction.most)
            try:
                data = self._source.recv(_PIECE)
            except OSError:  # reset: the other side is told that it is the end
                data = b""
            due = self._direction.enter(self._name, len(data))
            with self._changed:
                self._on_the_way.append((due, data))
                self._size += len(data)
                self._changed.notify_all()

    def _give(self) -> None:
        data = b"..."
        while data:
            with self._changed:
                self._changed.wait_for(lambda: self._on_the_way)
                due, data = self._on_the_way.popleft()
            if (early := due - time.monotonic()) > 0:
                time.sleep(early)
            with contextlib.suppress(OSError):  # the receiver is gone: the rest is dropped
                self._target.sendall(data) if data else self._target.shutdown(socket.SHUT_WR)
            with self._changed:
                self._size -= len(data)
                self._changed.notify_all()


class Proxy:
    """The listening end of one name, host and port."""

    def __init__(self, name: str, place: tuple[str, int], there: Direction, back: Direction) -> None:
        self._name, self._place, self._there, self._back = name, place, there, back
        self._listener = socket.socket()
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER)  # accepted ones have it too
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen(100)
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            near, _ = self._listener.accept()
            threading.Thread(target=self._connect, args=(near,), daemon=True).start()

    def _connect(self, near: socket.socket) -> None:
        time.sleep(self._there.delay_s + self._back.delay_s)
        far = socket.socket()
        try:
            far.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER)
            far.connect(self._place)
        except OSError:
            near.close()
            return
        for end in (near, far):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        Flow(self._name, self._there, near, far)
        Flow(self._name, self._back, far, near)


def main() -> None:
    delay_s, rate = map(float, sys.argv[1:])
    there, back = Direction(delay_s, rate), Direction(delay_s, rate)
    for line in sys.stdin:
        match line.split():
            case ["open", name, host, port]:
                print(Proxy(name, (host, int(port)), there, back).port, flush=True)
            case ["carried", name]:
                print(there.carried[name], back.carried[name], flush=True)


if __name__ == "__main__":
    main()
