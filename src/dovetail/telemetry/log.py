"""Lines for the person who watches.

Responsible for: `say` and `warn`, on standard error, so that standard output stays free for results and
scripts (`dovetail chat --prompt`). Coloured on a terminal, plain whole lines elsewhere.
Not responsible for: numbers over time (metrics.py), bars (progress.py).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console, RenderableType

CONSOLE = Console(stderr=True, highlight=False, markup=False, emoji=False)
"""The one console: a bar and the lines printed above it must go through the same object."""

_listeners: list[Callable[[str], None]] = []


def say(message: RenderableType) -> None:
    """Print one line, or a rich renderable such as a table."""
    # soft_wrap: a line in a log file stays one line, whatever width rich assumes there
    CONSOLE.print(message, soft_wrap=isinstance(message, str))


def warn(message: str, *, hint: str | None = None) -> None:
    """Print a warning: something is not as it should be, and the run goes on."""
    CONSOLE.print(f"warning: {message}", style="yellow", soft_wrap=True)
    if hint is not None:
        CONSOLE.print(f"hint: {hint}", soft_wrap=True)
    for listener in _listeners:
        listener(message if hint is None else f"{message}: {hint}")


@contextmanager
def warnings_heard_by(listener: Callable[[str], None]) -> Iterator[None]:
    """Give every warning of the block to `listener` too, with its hint."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)
