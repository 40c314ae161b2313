"""Read messages from the forms in which people keep conversations.

Responsible for: lists of messages in the common spellings, Anthropic transcripts, and the order of turns.
Not responsible for: columns (columns.py), or which turns are prompt and which answer (forms.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, cast

from dovetail.data.columns import BadRowError, describe, expect_characters, parsed
from dovetail.data.records import Message, Role, is_learnt, message

DEFAULT_NAMES = ("Human", "Assistant")
"""Names of user and assistant in the transcripts of Anthropic."""
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


_LEARNT_IF = {
    **dict.fromkeys(("weight", "train", "training", "trainable", "loss", "loss_mask", "loss_scale"), 1),
    "masked": 0,
}
"""Keys with which people mark single turns, and the value with which a turn is to be learnt."""
_LOST = (
    *("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking", "refusal", "train_detail"),
    *("images", "image", "videos", "video", "audios", "audio"),
)
"""The keys of a message that add something to its content."""
_PRINTED_MESSAGES = re.compile(r"""\s*(?:array\(\s*)?\[?\s*\{\s*['"](?:role|from|content|value)['"]\s*:""")


def messages_from(value: Any, column: str) -> list[Message]:
    """Return the messages of a list, each with `role` and `content` or with `from` and `value`."""
    items = _listed(parsed(value))
    if not isinstance(items, Sequence) or isinstance(items, str) or not items:
        raise BadRowError(f"{column} should be a list of messages, but is {describe(items)}")
    return merged([_message(item, f"{column}[{i}]") for i, item in enumerate(items)])


def messages_in(value: Any, column: str) -> list[Message] | None:
    """Return the messages that a value is, or holds as printed by JSON or Python; None for text such as "[2, 3]"."""
    items = _listed(parsed(value))
    if not isinstance(value, str):
        return messages_from(items, column) if isinstance(items, list) else None
    if isinstance(items, list) and items and all(_is_message(item) for item in items):
        return messages_from(items, column)
    if isinstance(items, str) and _PRINTED_MESSAGES.match(value):
        raise BadRowError(
            f"{column} begins as a list of messages, but is none: {describe(value)}",
            hint="write such lists as JSON: json.dumps(messages)",
        )
    return None


def _listed(value: Any) -> Any:
    """Return one message, or a table that is kept as columns, as a list of messages; anything else as it is."""
    if not isinstance(value, Mapping):
        return value
    if value and all(isinstance(items, list) for items in value.values()):
        return [dict(zip(value, items, strict=False)) for items in zip(*value.values(), strict=False)]
    return [value]


def _is_message(item: Any) -> bool:
    return isinstance(item, Mapping) and ("role" in item or "from" in item)


def transcript_from(text: str, column: str, names: tuple[str, str] = DEFAULT_NAMES) -> list[Message]:
    """Return the turns of "\\n\\nHuman: ...\\n\\nAssistant: ...".

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


def answer_from_transcript(text: str, names: tuple[str, str] = DEFAULT_NAMES) -> str:
    """Return an answer that stands apart from its prompt, without the name before it and without turns after it."""
    pieces = _markers(names).split(text)
    first = pieces[0].strip()
    if first or len(pieces) == 1:
        return first
    return pieces[2].strip() if pieces[1] == names[1] else ""


def begins_with_a_name(text: str, names: Sequence[str] = DEFAULT_NAMES) -> bool:
    """Return whether the first turn of a text is named: it is a transcript."""
    return re.match(rf"\s*({'|'.join(map(re.escape, names))}):", text) is not None


def merged(turns: Sequence[Message]) -> list[Message]:
    """Join neighbouring turns of one role, a blank line between: templates want roles to alternate."""
    out: list[Message] = []
    for turn in turns:
        if out and out[-1]["role"] == turn["role"]:
            if is_learnt(out[-1]) != is_learnt(turn):
                raise BadRowError("of two neighbouring turns of the assistant one is learnt, and one is not")
            out[-1]["content"] = "\n\n".join(part for part in (out[-1]["content"], turn["content"]) if part)
        else:
            out.append(turn.copy())
    return out


def has_empty_answer(turns: Sequence[Message]) -> bool:
    """Return whether an assistant's turn that is learnt says nothing: to imitate it is to learn to say nothing."""
    return any(
        turn["role"] == "assistant" and is_learnt(turn) and not turn["content"].strip() for turn in turns
    )


@lru_cache(maxsize=16)
def _markers(names: tuple[str, str]) -> re.Pattern[str]:
    """Return the pattern that finds where turns begin.

    Anthropic's names follow a blank line, since "Human:" also occurs inside text; other names, such as USER and
    ASSISTANT, follow any white space or an end-of-text token.
    """
    border = r"(?:\A\s*|\n\n\s*)" if names == DEFAULT_NAMES else r"(?:\A\s*|(?:</s>|\s)\s*)"
    return re.compile(rf"{border}({re.escape(names[0])}|{re.escape(names[1])}):")


def _message(item: Any, place: str) -> Message:
    if not isinstance(item, Mapping):
        raise BadRowError(f"{place} should be a message with role and content, but is {describe(item)}")
    role = item.get("role", item.get("from"))
    if not isinstance(role, str) or role.lower() not in _ROLES:
        known = ", ".join(sorted(_ROLES))
        raise BadRowError(f"{place} has the role {role!r}", hint=f"the roles that can be read are {known}")
    for key in _LOST:
        if item.get(key):
            raise BadRowError(
                f"{place} has {key} beside its content, which the model would not see",
                hint=f"write {key} into the content as the model is to read or write it, or remove it",
            )
    content = item.get("content", item.get("value", item.get("text")))
    turn = message(_ROLES[role.lower()], _content(content, place))
    if not _is_to_be_learnt(item, place, turn["role"]):
        turn["learnt"] = False
    return turn


def _is_to_be_learnt(item: Mapping[str, Any], place: str, role: Role) -> bool:
    """Return whether the keys of a message let its turn be learnt. Raise BadRowError if they cannot be followed."""
    marked = {key: item[key] for key in _LEARNT_IF if item.get(key) is not None}
    for key, value in marked.items():
        if value not in (0, 1):
            raise BadRowError(
                f"{place}.{key} is {describe(value)}",
                hint="a turn is learnt or not: write 0 or 1, true or false",
            )
        if role != "assistant" and value == _LEARNT_IF[key] == 1:
            raise BadRowError(f"{place}.{key} is {value!r}, but only turns of the assistant are learnt")
    return role != "assistant" or all(value == _LEARNT_IF[key] for key, value in marked.items())


def _content(content: Any, place: str) -> str:
    """Return the content of a message as text; it may be text or a list of parts that are all text."""
    if isinstance(content, str):
        return expect_characters(content, place)
    parts = content if isinstance(content, list) else []
    texts = [part.get("text") for part in parts if isinstance(part, Mapping)]
    if parts and len(texts) == len(parts) and all(isinstance(text, str) for text in texts):
        return expect_characters("".join(cast(list[str], texts)), place)
    raise BadRowError(f"the content of {place} should be text, but is {describe(content)}")
