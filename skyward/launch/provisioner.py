"""Machines for a pool from clouds: launched step by step of its plan, replaced, and destroyed.

Whatever is launched is in the journal before. When the pool ends, launches under way make nothing more and destroy what
they have made; the end waits for them, as a request that is under way may still make machines.
"""

from __future__ import annotations

import functools
import logging
import math
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from typing import Any

from skyward import events
from skyward.cleanup.end import end_places
from skyward.cleanup.journal import Place, this_owner
from skyward.cleanup.pool_record import LAUNCH_S, PoolRecord
from skyward.errors import (
    AllProvidersFailedError,
    CapacityError,
    PoolError,
    PoolTimeoutError,
    ProviderError,
)
from skyward.events import CostFinal, CostUpdate
from skyward.launch.cost import Meter, final, update
from skyward.launch.plan import Part, Plan, Step
from skyward.providers import retry
from skyward.providers.base import Cloud, LaunchOrder, Login, Machine, UserData, boot_s
from skyward.providers.launches import Gate
from skyward.spec.pool import PoolSpec
from skyward.spec.volume import S3Volume

logger = logging.getLogger(__name__)

BOOT_HEADROOM_S = 600
"""Seconds beyond the pool's time-out after which a machine switches itself off, if all else has failed."""
_MOST_TRIES = 12
"""Offers that are tried in one region and market. Chosen, not measured: the next ones differ little from these."""
_END_PAUSES_S = (2.0,)
"""Pauses between attempts to destroy, before the rest is left to the guardian."""


class Provisioner:
    """Has the machines of one pool. Its methods block and may be called from several threads."""

    def __init__(
        self, plan: Plan, spec: PoolSpec, pool_id: str, record: PoolRecord, emit: Callable[[Any], None], expires: float
    ) -> None:
        self._plan = plan
        self._spec = spec
        self._pool_id = pool_id
        self._record = record
        self._emit = emit
        self._expires = expires
        self._step: Step | None = None
        self._machines: dict[str, Machine] = {}
        self._since: dict[str, float] = {}  # when machines were launched, by id
        self._meter = Meter()
        self._lock = threading.Lock()
        self._regions: set[tuple[str, str]] = set()  # for which launches are announced
        self._places: set[Place] = set()  # where something may have been made
        self._gate = Gate()
        self._asked: dict[int, tuple[float, float]] = {}  # parts that are being launched: since when, USD per hour
        self._undone = 0.0  # USD for machines of launches that the pool's end has undone
        self._login, self._user_data = pool_keys(0)  # each launch gets the time that is left

    # --- launch ---------------------------------------------------------------------------------------------

    def launch(self) -> list[Machine]:
        """Return the pool's machines, those first that are no spot machines.

        Raises
        ------
        ProviderError
            The only thing that could be tried has failed.
        AllProvidersFailedError
            Everything that could be tried has failed; the message has a line for each.
        PoolError
            The pool has ended meanwhile.
        """
        attempts: list[tuple[Step, ProviderError]] = []
        tries: dict[tuple[int, str, bool], int] = {}
        for step in self._plan.steps:
            place = (id(step.provider), step.offer.region, _has_spot(step))
            if tries.get(place, 0) >= _MOST_TRIES or any(_rules_out(s, e, step) for s, e in attempts):
                continue
            tries[place] = tries.get(place, 0) + 1
            try:
                machines = self._launch_parts(step.provider, step.parts)
            except ProviderError as exc:
                attempts.append((step, exc))
                self._emit(events.Error(message=f"{step}: {exc}"))
                continue
            self._step = step
            if len({s.offer.region for s in self._plan.steps}) > 1:
                self._emit(events.RegionAutoSelected(region=step.offer.region, provider=step.provider.name))
            self._tell(machines, range(len(machines)))
            self._emit(events.ProvisioningCompleted())
            return machines
        raise _failed(attempts, self._plan.failed)

    def more(self, nodes: Sequence[int], taken: Sequence[str]) -> list[Machine]:  # noqa: ARG002 - a cloud makes new ones
        """Return machines for further nodes, by number: of the same offer, or the next one in the pool's region.

        Raises
        ------
        ProviderError
            None could be had.
        PoolError
            The pool has ended.
        """
        assert self._step is not None
        error: ProviderError | None = None
        for provider, part in self._parts_beside(self._step):
            try:
                machines = self._launch_parts(provider, [replace(part, count=len(nodes))])
            except ProviderError as exc:
                self._emit(events.Error(message=f"{len(nodes)} more of {part.offer.instance.name}: {exc}"))
                error = error or exc
                continue
            self._tell(machines, nodes)
            return machines
        assert error is not None
        raise error

    def _parts_beside(self, chosen: Step) -> list[tuple[Cloud, Part]]:
        """Return what more machines of a pool may be, best first: spot machines where the pool has some."""
        near = [s for s in self._plan.steps if s.provider is chosen.provider and s.offer.region == chosen.offer.region]
        near.sort(key=lambda step: step is not chosen)
        parts = {(p.offer.instance.name, p.spot): (s.provider, p) for s in near for p in reversed(s.parts)}
        return list(parts.values())[:_MOST_TRIES]

    def _launch_parts(self, provider: Cloud, parts: Sequence[Part]) -> list[Machine]:
        """Launch all parts side by side, or none."""
        with self._gate:
            threads = ThreadPoolExecutor(len(parts), thread_name_prefix="skyward-launch")
            launches = [threads.submit(self._launch, provider, part) for part in parts]
            threads.shutdown(wait=False)  # Ctrl-C comes through `wait`, which goes on in `end`
            wait(launches)
            errors = [error for launch in launches if (error := launch.exception()) is not None]
            machines = [m for launch in launches if launch.exception() is None for m in launch.result()]
            try:
                if errors:
                    raise min(errors, key=lambda error: isinstance(error, CapacityError))
                self._gate.check()
                self._record.add(machines)
            except BaseException as exc:
                if machines:
                    provider.terminate(machines)
                self._forget_asked(parts, were_made=isinstance(exc, PoolError))
                raise
        self._forget_asked(parts)
        with self._lock:
            for machine in machines:
                self._machines[machine.id] = machine
                self._since[machine.id] = time.monotonic()
                self._meter.add(machine)
        return machines

    def _forget_asked(self, parts: Sequence[Part], *, were_made: bool = False) -> None:
        """Count machines no longer as asked for. `were_made`: they have cost until now."""
        now = time.time()
        with self._lock:
            for part in parts:
                since, hourly = self._asked.pop(id(part), (now, 0.0))
                if were_made:
                    self._undone += (now - since) * hourly / 3600

    def _launch(self, provider: Cloud, part: Part) -> Sequence[Machine]:
        offer = part.offer
        limit_s = self._spec.boot_timeout or boot_s(offer.instance)
        place = Place(provider=provider.name, region=offer.region, settings=provider.settings())
        asked = 0

        def creating() -> None:
            nonlocal asked
            self._gate.check()
            if time.time() > self._expires:  # this computer was suspended, say: others have ended the pool
                raise PoolTimeoutError("the pool's timeout has passed: no more machines are launched for it")
            asked += 1

        order = LaunchOrder(
            pool_id=self._pool_id,
            token=secrets.token_hex(8),
            count=part.count,
            spot=part.spot,
            user_data=replace(self._user_data, ttl_s=max(0, int(self._expires - time.time())) + BOOT_HEADROOM_S),
            login=self._login,
            owner=this_owner(),
            expires=self._expires,
            max_price=self._spec.max_price,
            accelerator=self._spec.accelerator,
            volumes=tuple(v for v in self._spec.volume if isinstance(v, S3Volume)),
            boot_s=limit_s,
            creating=creating,
            pause=self._gate.pause,
            on_prepared=functools.cache(lambda: self._on_prepared(provider, part)),  # a provider may ask again
        )
        with self._gate, self._record.launching(place):
            try:
                return [replace(machine, boot_s=limit_s) for machine in provider.launch(offer, order)]
            finally:
                if asked:
                    self._places.add(place)

    def _on_prepared(self, provider: Cloud, part: Part) -> None:
        region, instance_type = part.offer.region, part.offer.instance.name
        with self._lock:
            is_new = (provider.name, region) not in self._regions
            self._regions.add((provider.name, region))
            self._asked[id(part)] = time.time(), (part.price or 0.0) * part.count
        if is_new:
            self._emit(events.InfraCreated(region=region))
        self._emit(events.InstanceLaunching(count=part.count, instance_type=instance_type, provider=provider.name))

    def _tell(self, machines: Sequence[Machine], nodes: Sequence[int]) -> None:
        self._record.number(machines, nodes)
        for node, machine in zip(nodes, machines, strict=True):
            self._emit(
                events.InstanceProvisioned(
                    instance_id=machine.id,
                    node=node,
                    spot=machine.spot,
                    provider=machine.provider,
                    ip=machine.public_ip,
                    instance_type=machine.instance_type,
                    price_on_demand=machine.price_on_demand,
                    price_spot=machine.price if machine.spot else None,
                )
            )

    # --- looking after them ---------------------------------------------------------------------------------

    def cost(self) -> CostUpdate:
        """Return what the pool costs at present.

        Machines that a cloud is being asked for count from then on, as it bills them before they have an address.
        """
        now = time.time()
        with self._lock:
            cost = update(self._meter, now)
            asked = list(self._asked.values())
        began = min((since for since, _ in asked), default=now)
        running = sum((now - since) * hourly / 3600 for since, hourly in asked)
        return replace(
            cost,
            elapsed_seconds=max(cost.elapsed_seconds, now - began),
            accumulated_cost=cost.accumulated_cost + self._undone + running,
            hourly_rate=cost.hourly_rate + sum(hourly for _, hourly in asked),
        )

    def final_cost(self) -> CostFinal:
        """Return what the pool has cost, at its end."""
        with self._lock:
            cost = final(self._meter, time.time())
            return replace(cost, total_cost=cost.total_cost + self._undone)

    def gone(self, machines: Sequence[Machine]) -> set[str]:
        """Return the ids of those machines that don't exist any more; none if the cloud does not say.

        The firewall lets the caller in again, if it was its address that has changed.
        """
        assert self._step is not None
        provider = self._step.provider
        try:
            with self._gate:
                for region in {machine.region or "" for machine in machines}:
                    provider.open_firewall(self._pool_id, region)
                there = {machine.id for machine in provider.machines(self._pool_id)}
        except (ProviderError, PoolError) as exc:
            names = ", ".join(machine.id for machine in machines)
            logger.info("%s does not say whether %s exist: %s", provider.name, names, exc)
            return set()
        young = time.monotonic() - retry.LISTED_S  # a machine that was launched since then may not be listed yet
        gone = [m for m in machines if m.id not in there and self._since.get(m.id, -math.inf) <= young]
        self._ended(gone, reclaimed=True)
        return {machine.id for machine in gone}

    def _ended(self, machines: Iterable[Machine], *, reclaimed: bool = False) -> None:
        with self._lock:
            for machine in machines:
                self._meter.end(machine.id, time.time(), reclaimed=reclaimed)
                self._machines.pop(machine.id, None)

    def discard(self, machine: Machine) -> None:
        """Destroy one machine, as far as there is anything left of it. Never raises: all are destroyed in the end."""
        assert self._step is not None
        try:
            with self._gate:
                self._emit(events.InstanceStopping(instance_id=machine.id))
                self._record.lost(machine.id)
                self._step.provider.terminate([machine])
        except (ProviderError, PoolError) as exc:
            logger.warning("%s may still run until its pool has ended: %s", machine.id, exc)
        else:
            self._ended([machine])

    def close(self, error: BaseException | None = None) -> None:
        """Launch nothing more. Launches under way soon raise `error`, and destroy what they have made.

        Without `error` they raise a PoolError. May be called twice.
        """
        self._gate.close(error)

    def end(self) -> list[str]:
        """Destroy everything, and return a line for each place where that could not be confirmed."""
        self.close()
        for machine_id in list(self._machines):
            self._emit(events.InstanceStopping(instance_id=machine_id))
        if not self._gate.wait(LAUNCH_S):
            return [f"a launch has not ended within {LAUNCH_S:g} s: the pool's guardian ends what comes of it"]
        left: list[str] = []
        for pause in (0.0, *_END_PAUSES_S):
            time.sleep(pause)
            left = end_places(self._pool_id, [place for place in self._record.places if place in self._places])
            if not left:
                self._ended(list(self._machines.values()))
                return []
        message = (
            f"machines of pool {self._pool_id} may still run and cost money: {'; '.join(left)}. The guardian keeps "
            f"trying to destroy them; you can do so too, with `skyward down {self._pool_id}`"
        )
        logger.error("%s", message)
        self._emit(events.Error(message=message))
        return left


def pool_keys(ttl_s: int) -> tuple[Login, UserData]:
    """Make the keys of a pool: one that logs in, and one by which its machines are recognised.

    The login has no host yet. The machines switch themselves off after `ttl_s` seconds.
    """
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    def pair() -> tuple[str, str]:
        key = Ed25519PrivateKey.generate()
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
        )
        public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
        return private.decode(), public.decode()

    (ours, our_public), (theirs, their_public) = pair(), pair()
    login = Login(host="", port=22, user="root", key=ours, host_key=their_public)
    authorized = f"{our_public} skyward"
    return login, UserData(host_key=theirs, host_key_public=their_public, authorized_key=authorized, ttl_s=ttl_s)


def _rules_out(tried: Step, error: ProviderError, step: Step) -> bool:
    """Tell whether it is of no use to try `step` after this failure."""
    if step.provider is not tried.provider:
        return False
    if error.rules_out == "provider":
        return True
    if step.offer.region != tried.offer.region:
        return False
    match error.rules_out:
        case "region":
            return True
        case "market":
            return _has_spot(step)
        case "type":
            return step.offer.instance.name == tried.offer.instance.name
        case "offer":
            return False


def _has_spot(step: Step) -> bool:
    return any(part.spot for part in step.parts)


def _failed(
    attempts: Sequence[tuple[Step, ProviderError]], not_asked: Sequence[tuple[str, ProviderError]]
) -> Exception:
    if len(attempts) == 1 and not not_asked:
        return attempts[0][1]
    lines = [f"{step}: {error}" for step, error in attempts]
    lines += [f"{name} could not be asked: {error}" for name, error in not_asked]
    reasons: dict[str, BaseException] = dict(not_asked)
    for step, error in attempts:
        reasons[step.provider.name] = error
    heading = f"no machines could be had; {len(lines)} attempts failed, and nothing is left of them:"
    text = "\n  ".join([heading, *lines])
    return AllProvidersFailedError(text, reasons=reasons, attempts=tuple(lines))
