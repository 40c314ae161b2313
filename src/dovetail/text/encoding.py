"""Encode text as token ids, piece by piece, as if the pieces had been encoded together.

Responsible for: encoding a passage behind another without a token across the border and without the extra
space that some tokenizers put before a text; special tokens that are only quoted; many passages in one
call; callers in several threads.
Not responsible for: which passages there are (chat_format.py).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from transformers import PreTrainedTokenizerBase

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
    """Whether the assistant wrote it and training learns it."""
    is_quoted: bool = False
    """Whether special tokens in it are plain text."""


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
