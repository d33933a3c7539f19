"""The soak runs on the same machines as the tests of machines."""

from tests.machines.conftest import baked, site

__all__ = ["baked", "site"]
