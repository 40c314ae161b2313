"""Messages as text and text as token ids, by the rules of a tokenizer and its chat template.

Responsible for: rendering, and errors of conversations that a template refuses; system messages and tools for templates
that take none; encoding a passage behind another without a token across the border or an added space, many passages in
one call, from several threads; the tokens that a model's own files say end an answer, as transformers' `generate` would
read them.
Not responsible for: conversations with their loss mask (chat_format.py), the text around an answer (turn_shape.py).

Some models end a turn with a token that neither tokenizer nor template names: GLM-4 with `<|user|>`, in
generation_config.json alone.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import jinja2
from transformers import PreTrainedTokenizerBase
from transformers.utils.hub import cached_file

from dovetail.errors import DataError, ModelError
from dovetail.text.message import Message, message
from dovetail.text.tools import Schema, as_user_turns, with_tools

_ATTRIBUTE = "dovetail_model_ends"
_FILES = ("generation_config.json", "config.json")
"""The files that may declare them; the first one that exists decides, as in transformers."""


def note_model_ends(tokenizer: PreTrainedTokenizerBase, name: str, revision: str | None) -> None:
    """Keep on `tokenizer` the end tokens that the model of the same folder or hub name declares."""
    declared = next((found for file in _FILES if (found := _read(name, file, revision)) is not None), {})
    ends = declared.get("eos_token_id")
    listed = ends if isinstance(ends, list) else [ends]
    # A token that the tokenizer lacks can never be drawn.
    kept = tuple(i for i in listed if isinstance(i, int) and 0 <= i < len(tokenizer))
    setattr(tokenizer, _ATTRIBUTE, kept)


def model_ends(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the tokens that `note_model_ends` kept; none for tokenizers made otherwise."""
    return tuple(getattr(tokenizer, _ATTRIBUTE, ()))


def _read(name: str, file: str, revision: str | None) -> dict[str, Any] | None:
    try:
        place = cached_file(
            name,
            file,
            revision=revision,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        found = None if place is None else json.loads(Path(place).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # loading the model reports it
        return None
    return found if isinstance(found, dict) else None


_ENCODING = threading.Lock()
"""The lock of all encoding. Each call sets a switch on the tokenizer's backend, whether special tokens are split,
and copies of a tokenizer share a backend. A single lock is never copied along with a tokenizer.
"""


@dataclass(frozen=True, slots=True)
class Passage:
    """One stretch of text with tokens of its own."""

    text: str
    behind: str = ""
    """The text before it, which is encoded too, so that spaces come out right, and then removed."""
    is_learnt: bool = False
    """True if the assistant wrote it and training learns it."""
    is_quoted: bool = False
    """True if special tokens in it are plain text."""


class Encoder:
    """An encoder of passages with one tokenizer, which never adds special tokens by itself."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._behind: dict[tuple[str, bool], list[int]] = {}

    def one(self, text: str) -> list[int]:
        """Return the tokens of a text, special tokens recognised."""
        return self._encode([text], is_quoted=False)[0]

    def as_given(self, text: str) -> list[int]:
        """Return the tokens of a text that the model will continue, special tokens recognised.

        The tokens that the tokenizer puts before a text stand in front, once. Those that it puts behind one are left
        out: an end-of-text token there would end the text.
        """
        bare = self.one(text)
        return bare if bare[: len(self._front)] == self._front else self._front + bare

    @cached_property
    def _front(self) -> list[int]:
        """The tokens that the tokenizer puts before a text by itself."""
        bare = self.one("a")
        with _ENCODING:
            whole = [int(i) for i in self._tokenizer("a")["input_ids"]]
        places = [i for i in range(len(whole)) if whole[i : i + len(bare)] == bare]
        return whole[: places[0]] if places else []

    def many(self, rows: Sequence[Sequence[Passage]]) -> list[list[list[int]]]:
        """Return the tokens of each passage of each row. Equal passages are encoded once."""
        wanted = dict.fromkeys(passage for row in rows for passage in row)
        ids: dict[Passage, list[int]] = {}
        for is_quoted in (False, True):
            chosen = [passage for passage in wanted if passage.is_quoted == is_quoted]
            joined = self._encode([passage.behind + passage.text for passage in chosen], is_quoted=is_quoted)
            for passage, whole in zip(chosen, joined, strict=True):
                ids[passage] = self._without(passage, whole)
        return [[ids[passage] for passage in row] for row in rows]

    def _without(self, passage: Passage, whole: list[int]) -> list[int]:
        """Return the tokens of the passage alone. Where a token crosses the border, encode the passage by itself."""
        if not passage.behind:
            return whole
        key = (passage.behind, passage.is_quoted)
        if key not in self._behind:
            self._behind[key] = self._encode([passage.behind], is_quoted=passage.is_quoted)[0]
        front = self._behind[key]
        if whole[: len(front)] == front:
            return whole[len(front) :]
        return self._encode([passage.text], is_quoted=passage.is_quoted)[0]

    def _encode(self, texts: list[str], *, is_quoted: bool) -> list[list[int]]:
        if not texts:
            return []
        with _ENCODING:
            encoded = self._tokenizer(
                texts,
                add_special_tokens=False,
                return_attention_mask=False,
                split_special_tokens=is_quoted,
                verbose=False,
            )
        return [list(ids) for ids in encoded["input_ids"]]


def special_token_texts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the texts that a tokenizer reads as special tokens, longest first."""
    texts = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return sorted({*texts, *tokenizer.all_special_tokens}, key=len, reverse=True)


def added_token_texts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return all texts that were added to the vocabulary whole, special or not, longest first."""
    return sorted({token.content for token in tokenizer.added_tokens_decoder.values()}, key=len, reverse=True)


class RefusedByTemplateError(DataError):
    """A conversation that the chat template does not take, such as one that the assistant begins."""


_PRINTED: tuple[Literal["role", "content", "name"], ...] = ("role", "content", "name")
"""The keys of a message that templates see."""

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
    """The chat template of one tokenizer, with the tools that every conversation offers."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tools: Sequence[Schema] = ()) -> None:
        self._tokenizer = tokenizer
        self._tells_time = "strftime_now" in str(tokenizer.chat_template)
        self._tools: Sequence[Schema] = ()
        """The tools that the template prints by itself."""
        self._written_tools = tools
        """The tools that are written into the system message, because the template has no place for them."""
        self._takes_system = self._renders([message("system", "s"), message("user", "u")])
        if tools and self._prints(tools):
            self._tools, self._written_tools = tools, ()

    def render(self, turns: Sequence[Message], generation: bool = True) -> str:
        """Return the text of a conversation, with the generation prompt behind it if asked for."""
        more: dict[str, Any] = (
            {"strftime_now": _stopped_at.strftime} if _stopped_at and self._tells_time else {}
        )
        if self._tools:
            more["tools"] = list(self._tools)
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    [{str(key): turn[key] for key in _PRINTED if key in turn} for turn in turns],
                    tokenize=False,
                    add_generation_prompt=generation,
                    **more,
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

    def adapted(self, messages: Sequence[Message]) -> list[Message]:
        """Put into other turns what the template has no place for: tools, their results, a system message."""
        turns = list(messages)
        if self._written_tools:
            turns = as_user_turns(with_tools(turns, self._written_tools))
        return self._with_system_folded(turns)

    def _prints(self, tools: Sequence[Schema]) -> bool:
        """Return whether the template prints tools."""
        asked = [message("user", "u")]
        without = self.render(asked)
        self._tools = tools
        try:
            return self.render(asked) != without
        finally:
            self._tools = ()

    def _with_system_folded(self, turns: list[Message]) -> list[Message]:
        """Put a system message in front of the first user's message where the template refuses one."""
        if self._takes_system or len(turns) < 2 or turns[0]["role"] != "system" or turns[1]["role"] != "user":
            return turns
        return [message("user", f"{turns[0]['content']}\n\n{turns[1]['content']}"), *turns[2:]]

    def _renders(self, turns: Sequence[Message]) -> bool:
        try:
            self.render(turns)
        except DataError:
            return False
        return True
