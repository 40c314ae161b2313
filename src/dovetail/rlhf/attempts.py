"""Load and call code of the user's, which may raise, hang or return nonsense.

Responsible for: a file as a module, calls in the background, time limits, further tries, async functions, and reasons
that name the file and line of an error.
Not responsible for: what is called, and what a failure costs (reward_functions.py, environments.py).
"""

import asyncio
import importlib
import importlib.util
import inspect
import sys
import threading
import time
import traceback
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from dovetail.errors import ConfigError

T = TypeVar("T")

PAUSES = (1.0, 4.0)
"""Seconds before the second and the third try of a call that failed."""
ONE_EACH = "return one finite number per answer, in the order given"
_REPAIR = "repair it, or what it asks, and give the same command again"


@dataclass(frozen=True, slots=True)
class Failure:
    """The reason why an answer has no score; it goes on from "reward function NAME" or "environment NAME"."""

    reason: str
    hint: str = _REPAIR


class WrongResultError(Exception):
    """A function returned something else than one value for each answer."""


def attempt(call: Callable[[], T], time_limit: float) -> T | Failure:
    """Call up to three times, with pauses; return what the first good call returns, or why the last one failed."""
    failure = Failure("was not called")
    for pause in (0.0, *PAUSES):
        time.sleep(pause)
        found = within(call, time_limit)
        if not isinstance(found, Failure):
            return found
        failure = found
    return failure


def within(call: Callable[[], T], time_limit: float) -> T | Failure:
    """Call once, in a thread of its own; return what it returns, or why it failed."""
    under_way = begin(call, time_limit)
    wait([under_way], time_limit)
    return outcome(under_way, time_limit)


class _TooLongError(Exception):
    """A call did not return in time."""


def begin(call: Callable[[], T], time_limit: float) -> Future[T]:
    """Begin a call in a thread of its own; one that hangs is left behind. A coroutine that it returns is awaited."""
    under_way: Future[T] = Future()

    def run() -> None:
        try:
            value: Any = call()
            under_way.set_result(_awaited(value, time_limit) if inspect.isawaitable(value) else value)
        except BaseException as error:
            under_way.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return under_way


def outcome(under_way: Future[T], time_limit: float) -> T | Failure:
    """Return what a call has returned, or why it failed; one that is not over has taken too long."""
    too_long = Failure(f"gave no answer within {time_limit:g} s", hint=f"{_REPAIR}; or raise time_limit")
    if not under_way.done():
        return too_long
    try:
        return under_way.result()
    except _TooLongError:
        return too_long
    except WrongResultError as error:
        return Failure(str(error), hint=ONE_EACH)
    except BaseException as error:  # whatever the user's function does; it ran in a thread of its own
        return Failure(f"raised {what_and_where(error)}")


def _awaited(coroutine: Awaitable[Any], seconds: float) -> Any:
    """Return the result of a coroutine, which is cancelled when its time is over."""

    async def held() -> tuple[Any, BaseException | None]:
        try:
            return await coroutine, None
        except BaseException as error:  # SystemExit would end the event loop
            return None, error

    async def limited() -> tuple[Any, BaseException | None]:
        task = asyncio.ensure_future(held())
        done, _ = await asyncio.wait([task], timeout=seconds)
        if not done:
            task.cancel()
            return None, _TooLongError()
        return task.result()

    value, error = asyncio.run_coroutine_threadsafe(limited(), _event_loop()).result()
    if error is not None:
        raise error
    return value


def awaited_by_thread(value: Awaitable[T]) -> T:
    """Wait for a coroutine in this thread, while it runs in the one event loop."""

    async def held() -> T:
        return await value

    return asyncio.run_coroutine_threadsafe(held(), _event_loop()).result()


@cache
def _event_loop() -> asyncio.AbstractEventLoop:
    """Return the one event loop of all async functions: what they keep between calls, as clients, belongs to it."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    return loop


_MACHINERY = (
    str(Path(__file__).parent),
    f"{Path(asyncio.__file__).parent}",
    "concurrent/futures",
    "importlib",
)


def what_and_where(error: BaseException) -> str:
    """Describe the error with the file and line of the user's code that raised it, or could not be read."""
    what = f"{type(error).__name__}: {getattr(error, 'msg', None) or error}"
    if isinstance(error, SyntaxError):
        return f"{what} ({error.filename} line {error.lineno})"
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not any(part in frame.filename for part in _MACHINERY)]
    if not own:
        return what
    line = [frame.lineno for frame in own if frame.filename == own[0].filename][-1]
    return f"{what} ({own[0].filename} line {line})"


def loaded(spec: str, setting: str, kind: str, *, hint: str) -> Any:
    """Return what `package.module:name` or `path/to/file.py:name` names.

    Raises ConfigError naming the setting, and what is missing or the file and line that cannot be run.
    """
    place, _, name = spec.rpartition(":")
    if not place or not name:
        raise ConfigError(f"{setting} = {spec!r} names no {kind}", hint=hint)
    try:
        module = (
            module_from_file(Path(place), kind) if place.endswith(".py") else importlib.import_module(place)
        )
    except (Exception, SystemExit) as error:  # whatever the user's file does when it is run
        raise ConfigError(
            f"{setting} = {spec!r} cannot be loaded: {what_and_where(error)}",
            hint="check the path and that the module can be imported from where you start dovetail",
        ) from error
    if not hasattr(module, name):
        raise ConfigError(f"{setting} = {spec!r} cannot be loaded: {place} has no {kind} {name}", hint=hint)
    return getattr(module, name)


def module_from_file(path: Path, kind: str) -> ModuleType:
    """Run a user's file and return it as a module; kind says what it is loaded for, and is part of its name."""
    file = path.expanduser()
    module_spec = importlib.util.spec_from_file_location(f"dovetail_{kind}_{file.stem}", file)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module  # where dataclasses and pickle look for it
    module_spec.loader.exec_module(module)
    return module
