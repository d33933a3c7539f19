"""Every error that skyward itself raises. Imports nothing of skyward.

::

    SkywardError
    ├── SpecError (ValueError)             the caller: a bad option, found before any machine starts
    ├── NoActivePoolError (RuntimeError)   the caller: `>> sky` outside a pool, or a pool used after its block
    ├── SerializationError (TypeError, PicklingError)  the caller: an argument, result or exception can't be pickled
    ├── VersionMismatchError               the caller: packages differ between caller and workers
    ├── NoMatchingInstanceError (ValueError)  the caller: no machine type matches the options
    ├── NoAvailableProviderError           no provider has a matching offer
    ├── AllProvidersFailedError            every provider with a matching offer failed
    ├── ProviderError                      the account or the cloud
    │   ├── CredentialsError
    │   ├── CapacityError
    │   └── QuotaError
    ├── PoolError (RuntimeError)           the pool as a whole: start-up failed, scheduler lost
    │   ├── BootstrapError                 a machine could not be prepared
    │   ├── PoolTimeoutError (TimeoutError)
    │   ├── PoolBudgetError
    │   └── VolumeError                    data of a volume was not uploaded
    ├── MachineLostError                   the machine: lost, and no retries left
    │   └── WorkerDiedError                the worker process: killed while it ran this very task
    └── TaskExitError                      the task: it called `sys.exit`

An exception that a call raises is none of these: it arrives as it was raised, with `RemoteTraceback` as its cause.
"""

from __future__ import annotations

import _pickle  # has pickle's errors without all the rest, and `import skyward` is to stay fast
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias


class SkywardError(Exception):
    """Root of all errors of skyward. Keyword arguments become attributes, and survive pickling."""

    def __init__(self, message: str = "", **facts: Any) -> None:
        super().__init__(message)
        self.__dict__.update(facts)

    def __reduce__(self) -> Any:
        # As BaseException has it, but its own: libraries that pickle tracebacks along treat the built-in one specially.
        return type(self), self.args, self.__dict__


class SpecError(SkywardError, ValueError):
    """An option has an invalid value. Attributes: `option`, `value`, `accepted`."""


def invalid(option: str, value: Any, accepted: str, *, shown: str = "") -> SpecError:
    """Return the error for the value of an option. `accepted` follows "expected"; `shown` replaces ``option=value``."""
    text = f"{shown or f'{option}={value!r}'} is invalid: expected {accepted}"
    return SpecError(text, option=option, value=value, accepted=accepted)


class NoActivePoolError(SkywardError, RuntimeError):
    """A call was sent without an active pool, or to a pool that is not active."""


class SerializationError(SkywardError, TypeError, _pickle.PicklingError):
    """An argument, result or exception can't be pickled. Attribute: `where`, e.g. ``"argument 'lock' of train()"``."""


class VersionMismatchError(SkywardError):
    """Packages differ between caller and workers. Attribute: `table`, rows of (package, here, there)."""


class NoMatchingInstanceError(SkywardError, ValueError):
    """No instance type matches the options."""


class NoAvailableProviderError(SkywardError):
    """No provider matches; the message shows the nearest offers."""


class AllProvidersFailedError(SkywardError):
    """Every provider that was tried has failed. Attribute: `reasons`, provider name → exception."""

    reasons: Mapping[str, BaseException]


RulesOut: TypeAlias = Literal["offer", "type", "market", "region", "provider"]


class ProviderError(SkywardError):
    """A provider refused or failed; the SDK's own error is the cause.

    Attribute: `rules_out`, the choices that would fail too: ``"offer"`` is this type in this region and market,
    ``"type"`` the type in both markets of the region, ``"market"`` all spot machines of the region, ``"region"`` and
    ``"provider"`` all their machines.
    """

    rules_out: RulesOut = "region"


class CredentialsError(ProviderError):
    """Credentials are missing, wrong or expired; the message says where skyward looked for them.

    Attribute: `missing`, whether no credentials were found.
    """

    missing: bool = False
    rules_out: RulesOut = "provider"


class CapacityError(ProviderError):
    """The provider has no such machine at present."""

    rules_out: RulesOut = "offer"


class QuotaError(ProviderError):
    """The account's quota does not allow the machine; the message says which and how to raise it."""

    rules_out: RulesOut = "offer"


class PoolError(SkywardError, RuntimeError):
    """The pool as a whole can't start or continue."""


class BootstrapError(PoolError):
    """A machine could not be prepared.

    Attributes: `machine`; `step`; the exit `status` of the step's command (None if it has none) and the `last_lines`
    of its output, at most 20; `instance_id`, the machine's name in events; and `log`, the path of its log on this
    computer. The last two may be None.
    """

    machine: str
    step: str
    last_lines: tuple[str, ...] = ()
    status: int | None = None
    instance_id: str | None = None
    log: str | None = None


class PoolTimeoutError(PoolError, TimeoutError):
    """The pool's `timeout` passed; everything was destroyed."""


class PoolBudgetError(PoolError):
    """The pool's `max_cost` was reached; everything was destroyed."""


class VolumeError(PoolError):
    """Data written to a volume was not uploaded to its bucket before the machine was destroyed.

    Attributes: `machine`; `volume`, the bucket and prefix as ``"s3://bucket/prefix"``; `mount_path`; `files` and
    `bytes` that were not uploaded, None if the machine could not be asked. For several volumes or machines, the message
    has a line for each, and the attributes are those of the first.
    """

    machine: str
    volume: str
    mount_path: str
    files: int | None = None
    bytes: int | None = None


class MachineLostError(SkywardError):
    """A call was lost with its machine more often than `retries` allows. Attributes: `machine`, `losses`."""


class WorkerDiedError(MachineLostError):
    """The worker process died while it ran the call: again on every retry, or after a generator's first value."""


class TaskExitError(SkywardError):
    """The call used `sys.exit`. Attribute: `code`."""


class RemoteTraceback(Exception):  # noqa: N818 - it is a text to be shown as a cause, never raised
    """The traceback of a task's exception, as text, set as its `__cause__`."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return f'\n"""\n{self.text}"""'
