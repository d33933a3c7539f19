"""Send what was written to a machine's volumes before the machine ends: the script that its start has left there."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence

from skyward.cluster.ssh import SSH_ERRORS, Link
from skyward.errors import VolumeError
from skyward.scripts.volumes import UNMOUNT, Left, read_left

SILENT_S = 45.0
"""Seconds without a word from a machine after which its data is given up. Chosen, not measured: a router restarts in
less, and the script says something every five."""
_AGAIN_S = 1.0


async def flush(
    link: Link, machine: str, buckets: Mapping[str, str], on_left: Callable[[Left], None] = lambda _: None
) -> None:
    """Send what was written to all volumes of a machine and unmount them, for as long as something is sent.

    Nothing may run on the machine that still writes. Another flush that is under way there is waited for.

    Parameters
    ----------
    machine
        Its name in messages.
    buckets
        Where each volume is kept, by the path on the machine: the ones that may be written to.
    on_left
        Hears about once a second what is left of one volume.

    Raises
    ------
    VolumeError
        Some data has not arrived, or it is not known because the machine does not answer.
    """
    if not buckets:
        return
    output: list[str] = []
    left: dict[str, Left] = {}
    heard_at = time.monotonic()

    def hear(line: str) -> None:
        nonlocal heard_at
        heard_at = time.monotonic()
        output.append(line)
        found = read_left(line)
        if found is not None:
            left[found.path] = found
            on_left(found)

    while True:
        output.clear()
        left.clear()
        running = asyncio.ensure_future(link.lines(f'[ ! -e "{UNMOUNT}" ] || sh "{UNMOUNT}"', hear))
        why = f"the machine has not answered for {SILENT_S:g} s"
        try:
            while not running.done() and time.monotonic() - heard_at < SILENT_S:
                await asyncio.wait([running], timeout=_AGAIN_S)
            if running.done():
                if running.result() == 0:
                    return
                break
        except (*SSH_ERRORS, ValueError) as exc:
            why = str(exc) or type(exc).__name__
        finally:
            running.cancel()
        if time.monotonic() - heard_at >= SILENT_S:
            raise _unknown(machine, buckets, why)
        await asyncio.sleep(_AGAIN_S)
    why = "\n  ".join(["its last lines:", *_after("::skyward line ", output)])
    failed = [rest.rpartition(" ")[0] for rest in _after("::skyward failed unmount ", output)]
    if refused := [left[path] for path in failed if path in left]:
        raise _refused(machine, buckets, refused, why)
    raise _unknown(machine, buckets, why)


def _after(prefix: str, lines: Sequence[str]) -> list[str]:
    """Return the rest of the lines that begin with `prefix`."""
    return [line.removeprefix(prefix) for line in lines if line.startswith(prefix)]


def _refused(machine: str, buckets: Mapping[str, str], left: Sequence[Left], why: str) -> VolumeError:
    what = "; ".join(f"{one}, written to {one.path}, for {buckets[one.path]}" for one in left)
    return VolumeError(
        f"{machine} could not send {what}: {why}",
        machine=machine,
        volume=buckets[left[0].path],
        mount_path=left[0].path,
        files=sum(one.files for one in left),
        bytes=sum(one.bytes for one in left),
    )


def _unknown(machine: str, buckets: Mapping[str, str], why: str) -> VolumeError:
    what = ", ".join(f"{path} ({bucket})" for path, bucket in buckets.items())
    path, bucket = next(iter(buckets.items()))
    return VolumeError(
        f"{machine} may not have sent all that was written to {what}: {why}",
        machine=machine,
        volume=bucket,
        mount_path=path,
    )
