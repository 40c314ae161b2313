"""Tools as text: their description for the model, and the calls that it writes.

Responsible for: schemas of Python functions, a description of tools for chat templates that have no place for them, and
reading calls in the form `<tool_call>{"name": ..., "arguments": {...}}</tool_call>` or by the tokenizer's own parser.
Not responsible for: rendering (template.py), running a tool (rlhf/environments.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import get_json_schema

from dovetail.errors import ConfigError
from dovetail.text.message import Message, message

Schema = dict[str, Any]
"""The JSON schema of a tool, as chat templates take it."""

_DESCRIPTION = """You may call tools. They are described here, one JSON object on a line:
<tools>
{tools}
</tools>
To call a tool, write a JSON object with its name and its arguments inside tags:
<tool_call>
{{"name": "the tool's name", "arguments": {{"an argument's name": "its value"}}}}
</tool_call>"""
_CALL = re.compile(r"<tool_call>(.*?)(</tool_call>|\Z)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A tool call that the model wrote."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True, slots=True)
class ParsedCalls:
    """The tool calls in an answer."""

    calls: tuple[ToolCall, ...] = ()
    errors: tuple[str, ...] = field(default=())
    """The reasons why calls cannot be read, as the model is to see them."""


def schema_of(tool: Callable[..., Any] | Schema) -> Schema:
    """Return the schema of a function, from its signature and docstring; a schema stays as it is.

    Raises ConfigError naming the function that has no docstring, or an argument without type or description.
    """
    if isinstance(tool, dict):
        return tool
    try:
        return dict(get_json_schema(tool))
    except Exception as error:  # transformers raises a class of its own for each kind of docstring
        name = getattr(tool, "__name__", repr(tool))
        raise ConfigError(
            f"the tool {name} cannot be described to the model: {error}",
            hint="give every argument a type, and describe function and arguments in a docstring with `Args:`",
        ) from error


def with_tools(turns: Sequence[Message], tools: Sequence[Schema]) -> list[Message]:
    """Describe the tools at the end of the system message, or in one of their own."""
    described = _DESCRIPTION.format(tools="\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools))
    if turns and turns[0]["role"] == "system":
        return [message("system", f"{turns[0]['content']}\n\n{described}"), *turns[1:]]
    return [message("system", described), *turns]


def as_user_turns(turns: Sequence[Message]) -> list[Message]:
    """Give the results of tools as messages of the user; neighbouring ones as one message."""
    given: list[Message] = []
    for place, turn in enumerate(turns):
        if turn["role"] != "tool":
            given.append(turn)
            continue
        text = f"<tool_response>\n{turn['content']}\n</tool_response>"
        if place and turns[place - 1]["role"] == "tool":
            given[-1] = message("user", f"{given[-1]['content']}\n{text}")
        else:
            given.append(message("user", text))
    return given


def parse_calls(
    text: str, tokenizer: PreTrainedTokenizerBase, *, prefix: str = "", tools: Sequence[Schema] = ()
) -> ParsedCalls:
    """Read the tool calls in an answer.

    prefix: the end of the prompt, for the tokenizer's own parser. Where the tokenizer has none, calls are in tags.
    """
    if getattr(tokenizer, "response_template", None) is None:
        found = [_call_in(match[1], is_closed=bool(match[2])) for match in _CALL.finditer(text)]
    else:
        found = _parsed_by(tokenizer, text, prefix, tools)
    calls = tuple(call for call in found if isinstance(call, ToolCall))
    return ParsedCalls(calls, tuple(error for error in found if isinstance(error, str)))


def _parsed_by(
    tokenizer: PreTrainedTokenizerBase, text: str, prefix: str, tools: Sequence[Schema]
) -> list[ToolCall | str]:
    """Return the calls that the tokenizer's own parser finds, or the reason why it fails."""
    try:
        parsed = tokenizer.parse_response(text, prefix=prefix, tools=list(tools))
    except Exception as error:  # whatever a parser of the model's author raises for a text of the model's
        return [f"the call cannot be read: {error}"]
    return [_checked(call.get("function", call)) for call in parsed.get("tool_calls") or ()]


def _call_in(text: str, *, is_closed: bool) -> ToolCall | str:
    """Return the call inside a pair of tags, or the reason why it cannot be read."""
    if not is_closed:
        return "the call has no closing tag </tool_call>"
    try:
        return _checked(json.loads(text))
    except (ValueError, RecursionError) as error:
        return f"the call is not valid JSON: {error}"


def _checked(call: Any) -> ToolCall | str:
    """Return a call with a name and arguments, or what it lacks."""
    name = call.get("name") if isinstance(call, dict) else None
    if not isinstance(name, str):
        return 'the call has no name: write {"name": ..., "arguments": {...}}'
    arguments = call.get("arguments", {})
    if not isinstance(arguments, dict):
        return f"the arguments of {name} are no JSON object"
    return ToolCall(name, arguments)
