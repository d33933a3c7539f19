"""One part of a broadcast: it waits for the others, and may have a separate process."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from typing import Any

from skyward.errors import SpecError, VersionMismatchError, WorkerDiedError
from skyward.transfer import pickling
from skyward.transfer.wire import Chunk, Kind, Layout, Outcome, Participant, barrier_handler
from skyward.worker import buffer_files, context, interrupts, raised, ranks
from skyward.worker.threads import node_cores, thread_environment


def pass_barrier(worker: Any, pool_id: str, part: Participant, fact: Any = None) -> list[Any]:
    """Wait until every participant is here, so that a collective set-up never waits for a busy slot.

    Returns what each has brought, by rank; less than that when they were sent away.
    """
    from distributed.utils import sync

    wait = getattr(worker.scheduler, barrier_handler(pool_id))
    facts: dict[str, Any] = sync(worker.loop, wait, name=part.barrier, count=part.size, rank=str(part.rank), fact=fact)
    return [facts[rank] for rank in sorted(facts, key=int)]


def run_isolated(
    chunk: Chunk,
    part: Participant,
    blobs: tuple[Any, ...],
    needs: Sequence[Any],
    worker: Any,
    me: interrupts.Running,
    layout: Layout,
) -> list[Outcome]:
    """Run the one call of a chunk in a separate process, when all participants are here and have what it needs."""
    assert chunk.isolation is not None
    host = context.host_of(worker.address)
    mine: list[Any] = [host, context.free_port(host), [_version(p) for p in chunk.isolation.packages]]
    facts: list[list[Any]] = pass_barrier(worker, layout.pool_id, part, mine) if part.barrier else [mine]
    if len(facts) < part.size:
        return [Outcome(me.why or Kind.CANCELLED)]  # the others were sent away
    machine = context.machine_name(layout, worker.address)
    try:
        check_versions(chunk.isolation.packages, [f[2] for f in facts])
        job = context.Job(worker.address, tuple(context.Peer(f[0], f[1]) for f in facts))
        token = context.running.set(context.Task(layout, worker.address, part, job.peers))
        try:
            environment = context.world().environment()
        finally:
            context.running.reset(token)
        environment[buffer_files.VARIABLE] = buffer_files.scratch(worker)
        if cores := node_cores(part):
            environment |= thread_environment(cores)
        data, buffers = pickling.dumps(list(needs))
        beside = [*blobs, *(buffer.raw() for buffer in buffers)]
        work = (chunk, job, data, len(blobs))
        found = ranks.run(chunk.key, work, beside, environment=environment, stop=lambda: me.why)
    except ranks.DiedError as exc:
        error = WorkerDiedError(
            f"the process of rank {part.rank} of {part.size} ended with {exc}; the others were stopped. If it was "
            "killed from outside, the machine may have run out of memory; a crash is in native code. Nothing is "
            "retried: send the call again, from a checkpoint if there is one.",
            machine=worker.address,
            losses=1,
        )
        kind = Kind.ABORTED if exc.ended_itself else Kind.DIED
        return [Outcome(kind, pickling.dumps(error)[0], machine=machine)]
    except Exception as exc:  # what is missing, or the process could not be started
        kind, data, buffers, text = raised.pack_outcome(exc, None)
        return [Outcome(kind, data, buffers, traceback=text, machine=machine)]
    if found is None:
        return [Outcome(me.why or Kind.CANCELLED)]
    return [o._replace(kind=me.why) if me.why and o.kind is Kind.CANCELLED else o for o in found.items]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # it may be there under another name, as tensorflow-cpu is
        return "unknown" if pickling.has_module(package) else None


def check_versions(packages: tuple[str, ...], found: list[list[str | None]]) -> None:
    """Raise unless every participant has all packages, in the same versions."""
    for package, versions in zip(packages, zip(*found, strict=True), strict=True):
        if missing := [rank for rank, version in enumerate(versions) if version is None]:
            raise SpecError(
                f"{package} is not installed on the pool's machines (ranks {', '.join(map(str, missing))} of "
                f"{len(versions)}): add it, image=sky.Image(pip=[{package!r}])",
                option="image.pip",
                value=None,
                accepted=f"a list with {package!r}",
            )
        if len(set(versions)) > 1:
            shown = ", ".join(f"rank {rank}: {version}" for rank, version in enumerate(versions))
            raise VersionMismatchError(
                f"{package} differs between the participants: {shown}. Name one version in the image: "
                f"sky.Image(pip=['{package}=={versions[0]}'])",
                table=[(package, str(versions[0]), str(v)) for v in versions[1:]],
            )
