"""Time the phases of a step.

Responsible for: adding up seconds by name. Not responsible for: showing them (progress.py, sinks.py).
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Stopwatch:
    """Seconds by phase; a phase that occurs again adds up.

    synchronize: called before each reading of the clock, such as `torch.cuda.synchronize`, since a GPU
    works on after Python has moved on. Without it a phase is charged for what it waited for.
    """

    def __init__(
        self, *, synchronize: Callable[[], None] | None = None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._synchronize = synchronize
        self._clock = clock
        self._seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Charge the time of the block to `name`, also if it raises."""
        start = self._now()
        try:
            yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + self._now() - start

    def seconds(self, group: str) -> dict[str, float]:
        """Return the phases as metrics: {"group/phase_seconds": seconds}."""
        return {f"{group}/{name}_seconds": seconds for name, seconds in self._seconds.items()}

    def _now(self) -> float:
        if self._synchronize is not None:
            self._synchronize()
        return self._clock()
