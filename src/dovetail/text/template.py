"""Render messages as text with a tokenizer's chat template.

Responsible for: rendering, errors of conversations that a template refuses, and system messages for templates that
take none.
Not responsible for: tokens (chat_format.py), the text around an answer (turn_shape.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from dovetail.errors import DataError, ModelError
from dovetail.text.message import Message, message


class RefusedByTemplateError(DataError):
    """A conversation that the chat template does not take, such as one that the assistant begins."""


_stopped_at: datetime | None = None


@contextmanager
def clock_stopped(at: datetime) -> Iterator[None]:
    """Let templates that print the date or the time print this one within the block, in all threads.

    A run is then the same on whatever day it is resumed, and its prompts do not change at midnight.
    """
    global _stopped_at
    before, _stopped_at = _stopped_at, at
    try:
        yield
    finally:
        _stopped_at = before


class Template:
    """The chat template of one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._tells_time = "strftime_now" in str(tokenizer.chat_template)
        self._takes_system = self._renders([message("system", "s"), message("user", "u")])

    def render(self, turns: Sequence[Message], generation: bool = True) -> str:
        """Return the text of a conversation, with the generation prompt behind it if asked for."""
        clock: dict[str, Any] = (
            {"strftime_now": _stopped_at.strftime} if _stopped_at and self._tells_time else {}
        )
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    [{"role": turn["role"], "content": turn["content"]} for turn in turns],
                    tokenize=False,
                    add_generation_prompt=generation,
                    **clock,
                )
            )
        except jinja2.TemplateSyntaxError as error:
            raise ModelError(
                f"the chat template is not valid Jinja: line {error.lineno}: {error.message}",
                hint="correct the template, or leave chat_template away to use the tokenizer's own",
            ) from error
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            roles = ", ".join(turn["role"] for turn in turns)
            raise RefusedByTemplateError(
                f"the chat template refuses a conversation of the turns {roles}: {error}",
                hint="change these rows, or set chat_template to one that takes them",
            ) from error

    def fold_system(self, messages: Sequence[Message]) -> list[Message]:
        """Put a system message in front of the first user's message where the template refuses one."""
        turns = list(messages)
        if self._takes_system or len(turns) < 2 or turns[0]["role"] != "system" or turns[1]["role"] != "user":
            return turns
        return [message("user", f"{turns[0]['content']}\n\n{turns[1]['content']}"), *turns[2:]]

    def _renders(self, turns: Sequence[Message]) -> bool:
        try:
            self.render(turns)
        except DataError:
            return False
        return True
