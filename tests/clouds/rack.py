"""Where emulated clouds boot their machines: each a machine in a box, or only an address where that is enough."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from pathlib import Path

from tests.cloudbox import Machine, Network


class Rack:
    """Boots machines in the background, as clouds do, and notices those that switch themselves off.

    Parameters
    ----------
    baked
        As `Machine` takes it: environments that every machine has from the start.
    boots
        False: machines are addresses without anything behind them, for tests of API calls alone.
    """

    def __init__(self, *, baked: Path | None = None, boots: bool = True) -> None:
        self.baked = baked
        self.boots = boots
        self.boot_delay_s = 0.0
        """Seconds that the next machines take before they begin to boot."""
        self.network = Network() if boots else None
        self.machines: dict[str, Machine] = {}
        """By name: those that have booted and are not destroyed."""
        self.failed: set[str] = set()
        """Names of those that could not boot."""
        self._gone: set[str] = set()
        self._threads: dict[str, threading.Thread] = {}
        self._closing = threading.Event()
        self._count = 0
        self._lock = threading.Lock()

    def boot(self, name: str, user_data: str, when_off: Callable[[], None] = lambda: None) -> str:
        """Begin to boot a machine and return its address. `when_off` is called if it switches itself off."""
        with self._lock:
            self._count += 1
            number = self._count
        if self.network is None:
            return f"10.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}"
        place = self.network.take_address()
        arguments = (name, user_data, place, self.boot_delay_s, when_off)
        thread = self._threads[name] = threading.Thread(
            target=self._boot, args=arguments, name=f"boot-{name}", daemon=True
        )
        thread.start()
        return place[0]

    def _boot(
        self, name: str, user_data: str, place: tuple[str, int], delay_s: float, when_off: Callable[[], None]
    ) -> None:
        assert self.network is not None
        self._closing.wait(delay_s)
        if name in self._gone:
            self.network.free_address(place[1])
            return
        try:
            machine = Machine(self.network, name, user_data, baked=self.baked, place=place)
        except BaseException:
            self.failed.add(name)
            raise
        with self._lock:
            if name in self._gone:  # ended while it booted
                machine.destroy()
                return
            self.machines[name] = machine
        machine.wait()
        with self._lock:
            by_itself = self.machines.pop(name, None) is not None
        machine.destroy()
        if by_itself:
            when_off()

    def destroy(self, name: str) -> None:
        """Switch a machine off at once; its address is free again. May be called twice, and while it boots."""
        with self._lock:
            self._gone.add(name)
            machine = self.machines.pop(name, None)
        if machine is not None:
            machine.destroy()

    def close(self) -> None:
        self._closing.set()
        for name in list(self._threads):
            self.destroy(name)
        # One that still boots would lose its cable to whoever gets this network's number next.
        for thread in self._threads.values():
            thread.join(timeout=60)
        if self.network is not None:
            with contextlib.suppress(OSError):
                self.network.close()
