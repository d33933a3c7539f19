"""Decodes outcomes: into values and exceptions, in the thread that wants them."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable
from typing import Any

from skyward import user_errors
from skyward.engine.calls import Call
from skyward.transfer import pickling
from skyward.transfer.wire import Kind, Outcome
from skyward.worker import raised

logger = logging.getLogger(__name__)


class Decoder:
    """Turns outcomes into values or exceptions, and issues the tasks' warnings again, once per place."""

    def __init__(self) -> None:
        self._registry: dict[Any, Any] = {}

    def decode(self, call: Call, outcome: Outcome | BaseException) -> tuple[bool, Any]:
        """Return (True, value) or (False, exception)."""
        if isinstance(outcome, BaseException):
            return False, outcome
        if outcome.warnings and (error := self.issue(outcome.warnings)) is not None:
            return False, error
        if outcome.kind is Kind.VALUE:
            try:
                return True, pickling.loads(outcome.data, outcome.buffers)
            except BaseException as exc:  # its class needs a package that only the worker has; or its __setstate__
                if isinstance(exc, KeyboardInterrupt) and user_errors.ends_program(exc):
                    raise
                return False, raised.unreadable(f"the result of {call.label}()", exc)
        return False, raised.unpack(outcome, call.label, call.timeout)

    def issue(self, found: Iterable[tuple[str, bytes, str, int]]) -> Warning | None:
        """Issue warnings of calls again. Return the first that the caller's filters make an error of, if any."""
        for text, data, filename, line in found:
            try:
                self._warn(text, data, filename, line)
            except Warning as warning:
                return warning
            except Exception:  # whatever the warning's __str__, or the caller's `warnings.showwarning`, raises
                user_errors.log(logger, "a call's warning can't be shown: %s", text)
        return None

    def _warn(self, text: str, data: bytes, filename: str, line: int) -> None:
        try:
            warning = pickling.loads(data)
        except Exception:  # its category is one that only the worker knows: the text matters more
            warning = UserWarning(text)
        warnings.warn_explicit(warning, type(warning), filename, line, registry=self._registry)
