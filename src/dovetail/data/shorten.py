"""Make a prompt fit: take away its oldest part.

Responsible for: which text goes when a prompt is cut from the left. The result is a conversation that the chat
template renders as any other, never a torn one.
Not responsible for: whether prompts are cut at all (tokenize.py).
"""

from __future__ import annotations

from collections.abc import Sequence

from dovetail.data.records import Message
from dovetail.text.chat_format import ChatFormat


def shortened(messages: Sequence[Message], max_tokens: int, chat: ChatFormat) -> tuple[Message, ...] | None:
    """The prompt in at most `max_tokens` tokens; None if not even an empty last turn fits.

    The oldest exchanges go first, whole; then the beginning of the last user's turn. The system message stays.
    """
    system = [turn for turn in messages[:1] if turn["role"] == "system"]
    turns = list(messages[len(system) :])
    while _num_tokens([*system, *turns], chat) > max_tokens:
        following = next((i for i, turn in enumerate(turns) if i > 0 and turn["role"] == "user"), None)
        if following is None:
            return _with_last_turn_cut(system, turns[-1], max_tokens, chat)
        turns = turns[following:]
    return (*system, *turns)


def _with_last_turn_cut(
    system: list[Message], turn: Message, max_tokens: int, chat: ChatFormat
) -> tuple[Message, ...] | None:
    """The longest end of the turn's text that fits, by bisection over characters."""
    text = turn["content"]

    def fits(num_chars: int) -> bool:
        return _num_tokens(_cut(system, turn, num_chars), chat) <= max_tokens

    if not fits(1):
        return None
    low, high = 1, len(text)  # `low` fits, `high` does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return tuple(_cut(system, turn, low))


def _cut(system: list[Message], turn: Message, num_chars: int) -> list[Message]:
    kept: Message = {"role": turn["role"], "content": turn["content"][-num_chars:]}
    return [*system, kept]


def _num_tokens(messages: Sequence[Message], chat: ChatFormat) -> int:
    return len(chat.prompt_ids(messages))
