"""Numbers over the steps of a run: flat names with units, one row per step, to every sink.

Responsible for: the shape of a row. Not responsible for: where it goes (sinks.py), what it means.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import SupportsFloat

from dovetail.telemetry.sinks import Sink

_NAME = re.compile(r"[A-Za-z0-9_.@-]+(/[A-Za-z0-9_.@-]+)+")


class Metrics:
    """Gives each row to all sinks. `more` is asked for numbers that every row takes along."""

    def __init__(
        self, sinks: Sequence[Sink], *, more: Callable[[], Mapping[str, float]] | None = None
    ) -> None:
        self.sinks = tuple(sinks)
        self._more = more

    def record(self, step: int, values: Mapping[str, SupportsFloat]) -> None:
        """Write one row. Names look like `ppo/kl_nats_per_answer`; values are numbers already on the host."""
        values = {**values, **(self._more() if self._more else {})}
        for name in values:
            if not _NAME.fullmatch(name):
                raise ValueError(f"metric name {name!r} is not group/name of letters, digits and _ . @ -")
        row = {name: float(value) for name, value in values.items()}
        for sink in self.sinks:
            sink.write(step, row)

    def close(self) -> None:
        """Flush and close all sinks."""
        for sink in self.sinks:
            sink.close()

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
