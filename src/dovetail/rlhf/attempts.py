"""Load and call code of the user's, which may raise, hang or return nonsense.

Responsible for: a file as a module, time limits, further tries, async functions, and reasons that name the file and
line of an error.
Not responsible for: what is called, and what a failure costs (reward_functions.py).
"""

import asyncio
import importlib.util
import inspect
import sys
import threading
import time
import traceback
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

T = TypeVar("T")

PAUSES = (1.0, 4.0)
"""Seconds before the second and the third try of a call that failed."""
ONE_EACH = "return one finite number per answer, in the order given"
_REPAIR = "repair it, or what it asks, and give the same command again"


@dataclass(frozen=True, slots=True)
class Failure:
    """The reason why an answer has no score; it goes on from "reward function NAME"."""

    reason: str
    hint: str = _REPAIR


class WrongResultError(Exception):
    """A function returned something else than one value for each answer."""


def attempt(call: Callable[[], T], time_limit: float) -> T | Failure:
    """Call up to three times, with pauses; return what the first good call returns, or why the last one failed."""
    failure = Failure("was not called")
    for pause in (0.0, *PAUSES):
        time.sleep(pause)
        try:
            return _within(time_limit, call)
        except _TooLongError:
            failure = Failure(
                f"gave no answer within {time_limit:g} s", hint=f"{_REPAIR}; or raise time_limit"
            )
        except WrongResultError as error:
            failure = Failure(str(error), hint=ONE_EACH)
        except (Exception, SystemExit) as error:  # whatever the user's function does
            failure = Failure(f"raised {what_and_where(error)}")
    return failure


class _TooLongError(Exception):
    """A call did not return in time."""


def _within(seconds: float, call: Callable[[], T]) -> T:
    """Return what `call` returns, which runs in a thread of its own; one that hangs is left behind."""
    returned: list[T] = []
    raised: list[BaseException] = []

    def run() -> None:
        try:
            value: Any = call()
            returned.append(_awaited(value, seconds) if inspect.isawaitable(value) else value)
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if raised:
        raise raised[0]
    if not returned:
        raise _TooLongError
    return returned[0]


def _awaited(coroutine: Awaitable[Any], seconds: float) -> Any:
    """Return the result of a coroutine, which is cancelled when its time is over."""

    async def held() -> tuple[Any, BaseException | None]:
        try:
            return await coroutine, None
        except (Exception, SystemExit) as error:  # SystemExit would end the event loop
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
