"""What `max_nbytes` and `mmap_mode` of `joblib.Parallel` mean for the arrays that tasks get."""

from __future__ import annotations

from skyward.engine import Access, Engine
from skyward.errors import invalid


def access(max_nbytes: float | None, mmap_mode: str | None, engine: Engine) -> Access:
    """Return how tasks see large arrays: as with joblib's own processes on one machine.

    Parameters
    ----------
    max_nbytes
        Arrays of more bytes are memory maps in `mmap_mode`; smaller ones are the task's own, as are all with None.

    Raises
    ------
    SpecError
        There is no such mode, or tasks would write into one file and are on several machines.
    """
    if max_nbytes is None or mmap_mode is None:
        return Access("c", 0)
    over = max(0, int(max_nbytes))
    match mmap_mode:
        case "r" | "c":
            return Access(mmap_mode, over)
        case "r+" | "w+":  # joblib takes them for the same
            if engine.store.has_files:
                return Access("r+", over)
            accepted = "'r', 'c' or None"
            why = " on a pool of other machines, where tasks can't write into one file: let them return what they write"
        case _:
            accepted, why = "'r', 'r+', 'w+', 'c' or None", ""
    raise invalid("mmap_mode", mmap_mode, accepted + why)
