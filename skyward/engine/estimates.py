"""How long calls take, and so how many of them a chunk holds."""

from __future__ import annotations


class Estimates:
    """Running time per call of each function, from what workers measured."""

    TARGET_S = 0.2
    """Seconds of work that a chunk should hold: much more than its overhead, little enough to share out evenly."""
    FLOOR_S = 0.005
    """A chunk is not made shorter than this for the sake of sharing; below it, overhead would rule."""
    GUESS_S = 0.001
    """Seconds that a call of an unknown function is thought to take where the next chunk is a round trip away."""
    FAR_S = 0.01
    """From a round trip of so many seconds on, slots would idle for want of chunks. Chosen, not measured."""
    LONG_S = 1.0
    """Beside a call of so many seconds, the wait for the next one is short, even where machines are far away."""
    BUDGET_S = 0.3
    """After this many seconds a worker returns the calls of a chunk that it has not begun."""
    SHOWN_S = 10.0
    """Seconds of work in flight per slot of a joined cluster. Dask's `adapt` wants a worker for each 5 s of work that
    its scheduler knows of (`distributed.adaptive.target-duration`): this lets it double its workers."""
    SHOWN_BYTES = 64 << 20
    """Most bytes of arguments per slot that are sent to a joined cluster to show the demand. Chosen, not measured."""
    KEPT = 1024
    """Functions that are remembered, those that ran last."""

    def __init__(self) -> None:
        self._totals: dict[str, tuple[float, float]] = {}  # seconds and calls
        self.round_trip_s: float = 0.0  # to the scheduler and back, where that is far away

    def observe(self, digest: str, seconds: float, calls: int) -> None:
        if not calls:
            return
        # The last chunks count most, and among them the large ones.
        before, runs = self._totals.pop(digest, (0.0, 0.0))
        if len(self._totals) >= self.KEPT:  # a function whose state changes has another digest each time
            del self._totals[next(iter(self._totals))]
        self._totals[digest] = 0.5 * before + seconds, 0.5 * runs + calls

    def mean(self, digest: str) -> float | None:
        """Return the seconds that a call of a function takes; None when that is not known."""
        seconds, calls = self._totals.get(digest, (0.0, 0.0))
        return seconds / calls if calls else None

    def is_short(self, digest: str) -> bool:
        """Tell whether calls of a function take less than `LONG_S`. What is not known is thought to, far away."""
        seconds = self.mean(digest)
        return self.round_trip_s >= self.FAR_S if seconds is None else seconds < self.LONG_S

    def chunk_calls(self, digest: str) -> int:
        """Return how many calls of a function a chunk holds when there are plenty.

        Where nothing is known of it: 1, and as many as a round trip may take.
        """
        seconds = self.mean(digest)
        if seconds is None:
            return max(1, int(self.round_trip_s / self.GUESS_S))
        return max(1, int(self.TARGET_S / max(seconds, 1e-7)))

    def chunk_size(self, digest: str, remaining: int, slots: int) -> int:
        """Return how many of the `remaining` calls of one function the next chunk should hold; at least 1."""
        share = max(1, remaining // (2 * max(1, slots)))  # two chunks a slot are left: small ones at the end
        seconds = self.mean(digest)
        if seconds is None:
            # Nothing is known. A few at a time when there are plenty; the budget mends a wrong guess.
            return max(1, min(15 + self.chunk_calls(digest), share // 8))
        # A chunk runs while the next one is on its way.
        floor = min(max(self.FLOOR_S, self.round_trip_s), self.TARGET_S)
        least = max(1, int(floor / max(seconds, 1e-7)))
        return min(self.chunk_calls(digest), max(share, least))

    def chunks_shown(self, digest: str, size: int) -> int:
        """Return how many chunks per slot a joined cluster gets, so that it sees the demand and can scale.

        `size` is the bytes of one call's arguments.
        """
        seconds = self.mean(digest)
        if seconds is None:  # unknown: chunks may be much too small, and if calls are long, two are demand enough
            return 2
        chunk_bytes = max(1, size * self.chunk_calls(digest))
        return max(2, min(int(self.SHOWN_S / max(seconds, self.TARGET_S)), self.SHOWN_BYTES // chunk_bytes))
