"""Make a prompt fit by removing its oldest part.

Responsible for: which text is removed when a prompt is cut from the left. The result is a conversation that the chat
template renders as any other, never a torn one.
Not responsible for: whether prompts are cut at all (tokenize.py).
"""

from __future__ import annotations

from collections.abc import Sequence

from dovetail.data.records import Message
from dovetail.text.chat_format import ChatFormat


def shortened(messages: Sequence[Message], max_tokens: int, chat: ChatFormat) -> tuple[Message, ...] | None:
    """Return the prompt in at most `max_tokens` tokens; None if not even an empty last turn fits.

    The oldest exchanges are removed first, whole, then the beginning of the last user's turn. The system message
    stays.
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
    """Keep the longest end of the turn's text that fits, found by interpolation over characters."""
    low, high = 1, len(turn["content"])  # `low` fits, `high` does not
    low_tokens, high_tokens = (_num_tokens(_cut(system, turn, chars), chat) for chars in (low, high))
    if low_tokens > max_tokens:
        return None
    should_halve = False
    while high - low > 1 and low_tokens < max_tokens:
        share = 0.5 if should_halve else (max_tokens - low_tokens) / (high_tokens - low_tokens)
        middle = min(max(low + int((high - low) * share), low + 1), high - 1)
        tokens = _num_tokens(_cut(system, turn, middle), chat)
        if tokens <= max_tokens:
            low, low_tokens = middle, tokens
        else:
            high, high_tokens = middle, tokens
        should_halve = (
            not should_halve
        )  # every other step, so that uneven text costs no more than bisection twice
    return tuple(_cut(system, turn, low))


def _cut(system: list[Message], turn: Message, num_chars: int) -> list[Message]:
    kept: Message = {"role": turn["role"], "content": turn["content"][-num_chars:]}
    return [*system, kept]


def _num_tokens(messages: Sequence[Message], chat: ChatFormat) -> int:
    return len(chat.prompt_ids(messages))
