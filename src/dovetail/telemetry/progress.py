"""Show the progress of a stage: a bar with rate and remaining time on a terminal, a line now and then elsewhere.

Responsible for: counting steps, rate and remaining time, and showing them.
Not responsible for: keeping the numbers (metrics.py).
"""

import time
from collections import deque
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress

from dovetail.telemetry.log import CONSOLE

WINDOW = 30
"""Steps over which the rate is measured: long enough to be steady, short enough to notice a change."""
LONGEST_SILENCE = 60.0
"""Seconds after which a line is printed though `print_every` steps have not passed."""


class Progress:
    """Counts a stage's steps as they finish; use as `with Progress(...) as progress: progress.advance()`.

    start: steps done before, by a run that was resumed. print_every: steps between lines where there is no terminal.
    """

    def __init__(
        self,
        title: str,
        *,
        total: int,
        start: int = 0,
        print_every: int = 10,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.step = start
        self._total = total
        self._clock = clock
        self._times: deque[float] = deque(maxlen=WINDOW + 1)
        console = console or CONSOLE
        self._display: _Display = (
            _Bar(title, total, start, console)
            if console.is_terminal or console.is_jupyter
            else _Lines(title, total, print_every, console, clock)
        )

    def advance(self, shown: Mapping[str, float] | None = None) -> None:
        """One step is done; `shown` are the numbers worth a glance."""
        self._times.append(self._clock())
        self.step += 1
        numbers = "  ".join(f"{name} {value:.4g}" for name, value in (shown or {}).items())
        self._display.show(self.step, self._rate(), numbers)

    def __enter__(self) -> "Progress":
        self._times.append(self._clock())
        self._display.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._display.close()

    def _rate(self) -> str:
        elapsed = self._times[-1] - self._times[0]
        num_steps = len(self._times) - 1
        if num_steps == 0 or elapsed <= 0:
            return ""
        left = (self._total - self.step) * elapsed / num_steps
        return f"{format_rate(num_steps / elapsed)}  {format_seconds(left)} left"


class _Display(Protocol):
    def open(self) -> None: ...
    def show(self, step: int, rate: str, numbers: str) -> None: ...
    def close(self) -> None: ...


class _Bar:
    """The display of a terminal."""

    def __init__(self, title: str, total: int, start: int, console: Console) -> None:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[rate]}", markup=False),
            TextColumn("{task.fields[numbers]}", markup=False),
        )
        self._bar = RichProgress(*columns, console=console, refresh_per_second=4)
        self._task: TaskID = self._bar.add_task(title, total=total, completed=start, rate="", numbers="")

    def open(self) -> None:
        self._bar.start()

    def show(self, step: int, rate: str, numbers: str) -> None:
        self._bar.update(self._task, completed=step, rate=rate, numbers=numbers)

    def close(self) -> None:
        self._bar.stop()


class _Lines:
    """The display of a file or pipe: first and last step, every `print_every`-th, and never silent for long."""

    def __init__(
        self, title: str, total: int, print_every: int, console: Console, clock: Callable[[], float]
    ) -> None:
        self._title = title
        self._total = total
        self._print_every = print_every
        self._console = console
        self._clock = clock
        self._last_print: float | None = None

    def open(self) -> None:
        self._last_print = None

    def show(self, step: int, rate: str, numbers: str) -> None:
        now = self._clock()
        is_due = self._last_print is None or now - self._last_print >= LONGEST_SILENCE
        if is_due or step % self._print_every == 0 or step == self._total:
            self._last_print = now
            parts = (f"{self._title} {step}/{self._total}", rate, numbers)
            self._console.print("  ".join(part for part in parts if part), soft_wrap=True, markup=False)

    def close(self) -> None:
        """Do nothing: no resource is held."""


def format_rate(steps_per_second: float) -> str:
    """`3.2 steps/s`, or `62 s/step` for slow ones."""
    if steps_per_second >= 1:
        return f"{steps_per_second:.3g} steps/s"
    return f"{1 / steps_per_second:.3g} s/step"


def format_seconds(seconds: float) -> str:
    """`0:42`, `12:05`, `3:00:09`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
