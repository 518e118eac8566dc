"""Counters that many threads add to."""

from threading import Lock


class Tally:
    """Named sums, from zero. Thread-safe."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._sums: dict[str, float] = {}

    def add(self, name: str, amount: float = 1.0) -> None:
        """Adds `amount` to the sum called `name`, which is there from then on, even if zero."""
        with self._lock:
            self._sums[name] = self._sums.get(name, 0.0) + amount

    def snapshot(self) -> dict[str, float]:
        """The sums as they are now."""
        with self._lock:
            return dict(self._sums)
