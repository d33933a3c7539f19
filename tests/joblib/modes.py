"""How tasks see arrays for each `max_nbytes` and `mmap_mode`: as with loky in joblib 1.6.0.

`mmap_mode=None` fails there when an array is larger than `max_nbytes`; here it is what joblib's documentation says.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from joblib import Parallel, delayed

MIB = 1 << 20

SHARED, OWN = "read-only", "its own, writable"
SEEN: list[tuple[dict[str, Any], int, str]] = [
    ({}, MIB, OWN),
    ({}, MIB + 8, SHARED),
    ({"max_nbytes": None}, 2 * MIB, OWN),
    ({"max_nbytes": "3M"}, 2 * MIB, OWN),
    ({"max_nbytes": "3M"}, 4 * MIB, SHARED),
    ({"max_nbytes": 1000}, 1000, OWN),
    ({"max_nbytes": "1K"}, 2000, SHARED),
    ({"mmap_mode": None}, 2 * MIB, OWN),
    ({"mmap_mode": "c"}, 2 * MIB, OWN),
    ({"mmap_mode": "c", "max_nbytes": 0}, 80, OWN),
]
"""Options, bytes of the array, and how a task sees it."""


def fill(array: Any, value: int) -> tuple[str, float]:
    """Write into an array if that is possible; return how it was before."""
    before = float(array.sum())
    try:
        array[:] = value
    except ValueError:
        return SHARED, before
    return OWN, before


def seen(options: dict[str, Any], nbytes: int) -> str:
    """Return how six tasks see an array, if each finds it untouched by the others, and the caller does."""
    array = np.zeros(nbytes // 8)
    found = set(Parallel(n_jobs=2, batch_size=1, **options)(delayed(fill)(array, i + 1) for i in range(6)))
    assert {before for _, before in found} == {0.0}
    assert not array.any()
    ((how, _),) = found
    return how
