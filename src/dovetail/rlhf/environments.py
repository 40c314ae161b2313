"""Environments that a model talks to over several turns, and tools as the simplest of them.

Responsible for: the form of an environment, tools from Python functions, loading what a setting names, and the rules
that all episodes of a run share.
Not responsible for: playing episodes (episodes.py), the text of tools and calls (text/tools.py), scores (rewards.py).
"""

import inspect
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

from dovetail.config.stages import EnvironmentConfig
from dovetail.data.records import Message
from dovetail.errors import ConfigError
from dovetail.rlhf.attempts import Failure, awaited_by_thread, loaded, within
from dovetail.text.chat_format import ChatFormat
from dovetail.text.tools import ToolCall, schema_of

_SETTING = "ppo.environment.source"


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of the model, as an environment gets it."""

    text: str
    """The whole turn as text, tool calls included."""
    calls: tuple[ToolCall, ...] = ()
    """The tool calls in it, in order, if the environment has tools; all of them could be read."""


class Step(NamedTuple):
    """The answer of an environment to a turn."""

    reply: str | Sequence[Message] = ""
    """A text is the user's next message; or messages of the roles user and tool."""
    reward: float = 0.0
    """The reward of the turn, which is paid at its last token."""
    done: bool = False
    """True if the episode ends here; the reply is not read then."""


class Environment(Protocol):
    """A class of the user's, of which every episode has an object of its own.

    Both methods may be async. An attribute `tools`, a sequence of functions or JSON schemas, is described to the model,
    and a method `close()` is called when the episode is over, if the class has them.
    """

    def reset(self, row: dict[str, Any]) -> Any:
        """Begin an episode; row: the columns of the data row beside the prompt.

        Return None for the prompt as it is, a text that is added to its last message, or all messages of another
        prompt. A second parameter `seed` gets a number that the answers to one prompt share.
        """
        ...

    def step(self, turn: Turn) -> Any:
        """Return a `Step`, a tuple like it, or the text of a reply alone."""
        ...


class Tools:
    """An environment of tools: it runs the functions that the model calls, and ends with a turn without a call."""

    def __init__(self, tools: Sequence[Callable[..., Any]]) -> None:
        self.tools = tuple(tools)

    def reset(self, row: dict[str, Any]) -> None:
        """Begin with the prompt as it is."""

    def step(self, turn: Turn) -> Step:
        """Answer each call with the result of its function, or with the error that it raises."""
        if not turn.calls:
            return Step(done=True)
        return Step(
            [{"role": "tool", "content": self._result(call), "name": call.name} for call in turn.calls]
        )

    def _result(self, call: ToolCall) -> str:
        """Return the result of a call as text; the model reads what is wrong with it, and may try again."""
        functions = {tool.__name__: tool for tool in self.tools}
        if call.name not in functions:
            return f"error: there is no tool {call.name}; the tools are {', '.join(functions)}"
        try:
            inspect.signature(functions[call.name]).bind(**call.arguments)
        except TypeError as error:
            return f"error: {call.name}: {error}"
        try:
            value = functions[call.name](**call.arguments)
            return str(awaited_by_thread(value) if isinstance(value, Awaitable) else value)
        except (Exception, SystemExit) as error:  # whatever the tool does with the model's arguments
            return f"error: {type(error).__name__}: {error}"


EnvironmentSource = Callable[[], Any] | Sequence[Callable[..., Any]]
"""A class, or a function, that makes the environment of one episode; or functions as tools."""
Maker = Callable[[], Environment]


@dataclass(frozen=True, slots=True, kw_only=True)
class Environments:
    """The environments of a run: one is made for each episode, and all keep the same limits."""

    make: Maker
    name: str
    chat: ChatFormat
    """The chat format of the actor, with the tools of the environment."""
    has_tools: bool
    pays: bool
    """True if the environment gives rewards; tools alone do not."""
    max_turns: int
    time_limit: float
    """Seconds that one call of `reset` or `step` may take."""


def load_environment(spec: str) -> EnvironmentSource:
    """Load the class or the list of functions that a setting names. Raises ConfigError if it cannot be used."""
    hint = "write path/to/file.py:Class, package.module:Class, or the name of a list of functions there"
    source = loaded(spec, _SETTING, "environment", hint=hint)
    functions = source if isinstance(source, list | tuple) else [source]
    if not functions or not all(callable(function) for function in functions):
        raise ConfigError(f"{_SETTING} = {spec!r} is neither a class nor a list of functions", hint=hint)
    return source  # type: ignore[no-any-return]


def environments_of(
    given: EnvironmentSource | None, config: EnvironmentConfig | None, chat: ChatFormat
) -> Environments | None:
    """Return the environments of a run; None if it has none.

    given: a class, or functions as tools, in place of `config.source`. Raises ConfigError if it cannot be used.
    """
    if given is None and config is None:
        return None
    limits = config or EnvironmentConfig(source="")
    source = load_environment(limits.source) if given is None else given
    name = getattr(source, "__name__", "tools") if given is not None else limits.source
    if not isinstance(source, Sequence):
        return _made(source, name, True, limits, chat)
    return _made(partial(Tools, source), name, False, limits, chat)


def _made(make: Maker, name: str, pays: bool, limits: EnvironmentConfig, chat: ChatFormat) -> Environments:
    """Make one environment, to see that it can be used and which tools it has."""
    first = within(make, limits.time_limit)
    if isinstance(first, Failure):
        raise ConfigError(
            f"environment {name} {first.reason}", hint=f"it is called without arguments; {first.hint}"
        )
    missing = [method for method in ("reset", "step") if not callable(getattr(first, method, None))]
    if missing:
        raise ConfigError(
            f"environment {name} has no method {' and no method '.join(missing)}",
            hint="write a class with reset(row) and step(turn), or a list of functions as tools",
        )
    tools = [schema_of(tool) for tool in getattr(first, "tools", ())]
    return Environments(
        make=make,
        name=name,
        chat=ChatFormat(chat.tokenizer, tools=tools) if tools else chat,
        has_tools=bool(tools),
        pays=pays,
        max_turns=limits.max_turns,
        time_limit=limits.time_limit,
    )
