"""Messages from the forms in which people keep conversations.

Responsible for: lists of messages in the common spellings, Anthropic transcripts, and the order of turns.
Not responsible for: columns (columns.py), or which turns are prompt and which answer (forms.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, cast

from dovetail.data.columns import BadRowError, describe, expect_characters, parsed
from dovetail.data.records import Message, Role

_ROLES: dict[str, Role] = {
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "system": "system",
}


def messages_from(value: Any, column: str) -> list[Message]:
    """A list of messages, each with `role` and `content` or with `from` and `value`."""
    items = parsed(value)
    if not isinstance(items, Sequence) or isinstance(items, str) or not items:
        raise BadRowError(f"{column} should be a list of messages, but is {describe(items)}")
    return merged([_message(item, f"{column}[{i}]") for i, item in enumerate(items)])


def transcript_from(text: str, column: str, names: tuple[str, str] = ("Human", "Assistant")) -> list[Message]:
    """The turns of "\\n\\nHuman: ...\\n\\nAssistant: ...".

    An empty turn at the end, which opens an answer, is left out. Text before the first name is a system
    message.
    """
    pieces = _markers(names).split(text)
    if len(pieces) == 1:
        raise BadRowError(
            f'{column} has no turn that begins with "{names[0]}:" or "{names[1]}:": {describe(text)}',
            hint="set transcript: false for plain text, or transcript_names to the names in your file",
        )
    roles: dict[str, Role] = {names[0]: "user", names[1]: "assistant"}
    turns: list[Message] = [{"role": "system", "content": pieces[0].strip()}] if pieces[0].strip() else []
    for name, content in zip(pieces[1::2], pieces[2::2], strict=True):
        turns.append({"role": roles[name], "content": content.strip()})
    if turns[-1]["role"] == "assistant" and not turns[-1]["content"]:
        turns.pop()
    return merged(turns)


def answer_from_transcript(text: str, names: tuple[str, str] = ("Human", "Assistant")) -> str:
    """An answer kept apart from its prompt: without the name before it, and without turns after it."""
    pieces = _markers(names).split(text)
    first = pieces[0].strip()
    if first or len(pieces) == 1:
        return first
    return pieces[2].strip() if pieces[1] == names[1] else ""


def begins_with_a_name(text: str, names: tuple[str, str] = ("Human", "Assistant")) -> bool:
    """Whether a text is a transcript: its first turn is named."""
    return re.match(rf"\s*({re.escape(names[0])}|{re.escape(names[1])}):", text) is not None


def merged(turns: Sequence[Message]) -> list[Message]:
    """Neighbouring turns of one role as one, a blank line between: templates want roles to alternate."""
    out: list[Message] = []
    for turn in turns:
        if out and out[-1]["role"] == turn["role"]:
            content = "\n\n".join(part for part in (out[-1]["content"], turn["content"]) if part)
            out[-1] = {"role": turn["role"], "content": content}
        else:
            out.append(turn)
    return out


def has_empty_answer(turns: Sequence[Message]) -> bool:
    """Whether one of the assistant's turns says nothing: to imitate it is to learn to say nothing."""
    return any(turn["role"] == "assistant" and not turn["content"].strip() for turn in turns)


@lru_cache(maxsize=16)
def _markers(names: tuple[str, str]) -> re.Pattern[str]:
    """Where turns begin. Anthropic's names stand behind a blank line, since "Human:" also occurs inside text;
    other names, such as USER and ASSISTANT, behind any white space or an end-of-text token."""
    border = r"(?:\A\s*|\n\n\s*)" if names == ("Human", "Assistant") else r"(?:\A\s*|(?:</s>|\s)\s*)"
    return re.compile(rf"{border}({re.escape(names[0])}|{re.escape(names[1])}):")


def _message(item: Any, place: str) -> Message:
    if not isinstance(item, Mapping):
        raise BadRowError(f"{place} should be a message with role and content, but is {describe(item)}")
    role = item.get("role", item.get("from"))
    if not isinstance(role, str) or role.lower() not in _ROLES:
        known = ", ".join(sorted(_ROLES))
        raise BadRowError(f"{place} has the role {role!r}", hint=f"the roles that can be read are {known}")
    content = item.get("content", item.get("value", item.get("text")))
    return {"role": _ROLES[role.lower()], "content": _content(content, place)}


def _content(content: Any, place: str) -> str:
    """Text, or a list of parts that are all text."""
    if isinstance(content, str):
        return expect_characters(content, place)
    parts = content if isinstance(content, list) else []
    texts = [part.get("text") for part in parts if isinstance(part, Mapping)]
    if parts and len(texts) == len(parts) and all(isinstance(text, str) for text in texts):
        return expect_characters("".join(cast(list[str], texts)), place)
    raise BadRowError(f"the content of {place} should be text, but is {describe(content)}")
