"""Values that stay on the cluster."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Generic, TypeVar

from distributed import CancelledError, Future
from distributed.scheduler import KilledWorker

from skyward.errors import PoolError, WorkerDiedError

R = TypeVar("R")


if TYPE_CHECKING:

    class _Future(Future[R]):  # type: ignore[misc]
        pass
else:  # older versions of Dask have a class that is not generic

    class _Future(Future, Generic[R]):
        pass


class Persisted(_Future[R]):
    """A value that stays on the cluster; made by `ComputePool.persist`.

    Pass it to calls as an argument: they get the value. It is a `distributed.Future` of `pool.client`, so
    `distributed.wait`, `distributed.as_completed`, `client.gather` and Dask's collections take it too. The value is
    dropped when nothing refers to it, and computed again when it was lost with its machine.
    """

    before_result: Callable[[], None] | None = None
    """Issues the warnings of the call; set by the engine."""

    def result(self, timeout: float | None = None) -> R:
        """Wait for the value, fetch it and return it.

        Parameters
        ----------
        timeout
            Seconds to wait at most; None: no limit.

        Raises
        ------
        TimeoutError
            There is no value within `timeout` seconds.
        WorkerDiedError
            The call was lost with its worker more often than the pool's `retries` allow.
        PoolError
            The pool was closed.
        Exception
            What the call raised.
        """
        if self.client.status == "closed":
            raise PoolError("the value is gone: its pool is closed")
        try:
            value: R = super().result(timeout)
        except KilledWorker as exc:
            worker = getattr(exc.last_worker, "name", "") or getattr(exc.last_worker, "address", "")
            raise WorkerDiedError(
                f"{self.key} was lost with its worker, the last time on worker {worker}; it is not run again",
                machine=str(worker),
            ) from exc
        except CancelledError as exc:
            if self.client.status == "running":
                raise
            raise PoolError("the value is gone: its pool is closed") from exc
        if self.before_result is not None:
            self.before_result()
        return value

    def __repr__(self) -> str:
        return f"<Persisted {self.key}: {self.status}>"

