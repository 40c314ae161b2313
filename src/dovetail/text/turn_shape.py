"""Find the text that a chat template prints around an answer, by rendering a conversation with a hole in it.

Responsible for: the borders of an answer in a template. Not responsible for: tokens (chat_format.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from dovetail.errors import ModelError
from dovetail.text.message import Message, message
from dovetail.text.template import added_token_texts, special_token_texts

HOLE = "\ue000{}\ue001"
"""The placeholder of a content while a template is rendered: private-use characters, which no template changes."""
_OPENING = re.compile(r"(<[^<>\s]+>|[^\s<>]+[^\w\s<>])\s*\Z")


@dataclass(frozen=True, slots=True)
class TurnShape:
    """The text around an answer."""

    header: str
    """The text that opens the assistant's turn where the template has no generation prompt; part of the prompt."""
    lead: str
    """The white space between the generation prompt and the answer; part of the answer."""
    end: str
    """The text that ends an answer, up to and with the end-of-turn token; part of the answer."""
    printed_end: str
    """The part of `end` that the template itself prints: all, or nothing where `end` is only our eos token."""
    end_token: str
    """The last token of `end`."""
    tail: str
    """The end of every generation prompt, behind which an answer is encoded."""
    strips: bool
    """True if the template strips white space around contents."""

    @property
    def opening(self) -> str | None:
        """The tag or named mark that ends a generation prompt, such as `<think>` or `Assistant:`.

        A bare word is no mark: an answer may well begin with it.
        """
        found = _OPENING.search(self.tail)
        return found[1] if found else None

    @property
    def closing_tag(self) -> str | None:
        """The tag that an answer must close, such as `</think>`, where the generation prompt ends with `<think>`."""
        tag = re.fullmatch(r"<(\w+)>", self.opening or "")
        return f"</{tag[1]}>" if tag else None

    def opens(self, text: str) -> bool:
        """Return whether a text ends with the mark that ends a generation prompt."""
        return self.opening is not None and text.rstrip().endswith(self.opening)

    def without_opening(self, answer: str) -> str:
        """Return an answer without the mark that the generation prompt ends with, if it begins with it again."""
        mark = self.opening
        if mark is None or not answer.lstrip().startswith(mark):
            return answer
        behind = self.tail[self.tail.rindex(mark) + len(mark) :]
        return answer.lstrip().removeprefix(mark).removeprefix(behind).removeprefix(self.lead)


def learn_shape(
    tokenizer: PreTrainedTokenizerBase, render: Callable[[Sequence[Message], bool], str]
) -> TurnShape:
    """Probe a template. `render` takes turns and whether to add the generation prompt."""
    hole = HOLE.format(0)
    user = message("user", "u")
    prompt, without_flag = render([user], True), render([user], False)
    before, found, after = render([user, message("assistant", hole)], False).partition(hole)
    if not found:
        raise ModelError(
            "the chat template does not print what the assistant says",
            hint="set chat_template to one that prints message['content'] of every role",
        )
    gap = before.removeprefix(prompt) if before.startswith(prompt) else ""
    # Anything but white space is either the header of a template without a generation prompt, or a block for
    # reasoning that the template puts before the last answer: the model must decide on that one by itself.
    header = gap if gap.strip() and prompt == without_flag else ""
    end, end_token = _end_of_turn(after, tokenizer)
    padded = render([user, message("assistant", f" {hole} ")], False)
    return TurnShape(
        header=header,
        lead="" if gap.strip() else gap,
        end=end or end_token,
        printed_end=end,
        end_token=end_token,
        tail=_common_suffix(prompt + header, render([message("user", "v")], True) + header),
        strips=f" {hole} " not in padded,
    )


def _end_of_turn(after: str, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """Return the text that ends an answer, up to and with the first special token, and that token."""
    for candidates in (special_token_texts(tokenizer), added_token_texts(tokenizer)):
        found = [(after.find(token), token) for token in candidates if token.strip() and token in after]
        if found:
            place, token = min(found, key=lambda pair: (pair[0], -len(pair[1])))
            return after[: place + len(token)], token
    eos = tokenizer.eos_token
    if not isinstance(eos, str):
        raise ModelError(
            "the tokenizer has no end-of-text token, and the template ends answers with no special token",
            hint="set eos_token in the tokenizer's tokenizer_config.json, so that answers can end",
        )
    return "", eos


def _common_suffix(one: str, other: str) -> str:
    length = 0
    while length < min(len(one), len(other)) and one[-1 - length] == other[-1 - length]:
        length += 1
    return one[len(one) - length :]
