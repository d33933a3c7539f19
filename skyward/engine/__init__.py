"""Calls become Dask futures here: batches, outcomes, the store for large arguments. Knows no machine."""

from skyward.engine.calls import Call
from skyward.engine.engine import Engine
from skyward.engine.group import FutureGroup
from skyward.transfer.wire import Access

__all__ = ["Access", "Call", "Engine", "FutureGroup"]
