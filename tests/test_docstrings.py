"""The examples in docstrings run, and give what they say."""

from __future__ import annotations

import doctest
import importlib

import pytest

MODULES = ["skyward.compute.function", "skyward.executor", "skyward.pool.decorator", "skyward_joblib.pools"]


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_run(name: str) -> None:
    module = importlib.import_module(name)

    failed, attempted = doctest.testmod(module, extraglobs={"__name__": "__main__"})  # as in a script

    assert attempted > 0
    assert failed == 0
