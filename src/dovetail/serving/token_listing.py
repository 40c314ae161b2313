"""List the tokens of a text with the part of the text that each one writes, so that the parts joined are the text.

Responsible for: the part of the text that belongs to each token, its offset, and the tokens that the text does not
show. Not responsible for: the text (text/text_stream.py), the JSON of the list (responses.py).

The text of a token depends on its place: SentencePiece writes its space only behind another token. A token that is
only part of a character is listed as U+FFFD.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dovetail.engine.scheduler import TopLogprobs
from dovetail.text.chat_format import ChatFormat
from dovetail.text.text_stream import TextStream

_HALF = "\ufffd"


@dataclass(frozen=True, slots=True)
class ScoredToken:
    """A token and its log-probability at its place."""

    id: int
    logprob: float | None
    """The log-probability; None for the first token of a text, which has no context."""
    top_logprobs: TopLogprobs = ()
    """The likeliest tokens at its place, if they were requested."""


@dataclass(frozen=True, slots=True)
class ListedToken:
    """A token as a response lists it."""

    text: str
    offset: int
    """The place at which it begins in the text."""
    logprob: float | None
    top_logprobs: Sequence[tuple[str, float]]


class TokenTexts:
    """The texts of the single tokens of one tokenizer."""

    def __init__(self, chat: ChatFormat) -> None:
        self._tokenizer = chat.tokenizer
        self._front = chat.text_ids("a")
        self._num_front = len(self.decode(self._front))

    def alone(self, token_id: int) -> str:
        """Return the token's text at the beginning of a text."""
        return self.decode([token_id])

    def behind(self, token_id: int) -> str:
        """Return the token's text behind another token."""
        return self.decode([*self._front, token_id])[self._num_front :]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of these tokens, special tokens included."""
        return str(self._tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))


@dataclass(frozen=True, slots=True)
class _Read:
    """A token and its part of the text, before the text is cut at either end."""

    token: ScoredToken
    start: int
    text: str

    @property
    def end(self) -> int:
        return self.start + len(self.text)


class TokenListing:
    """The tokens of one text. `read` takes them in; `show` and `rest` return those that belong to the shown text."""

    def __init__(
        self, texts: TokenTexts, stream: TextStream, *, offset: int = 0, lists_all: bool = False
    ) -> None:
        """Begin with no tokens.

        stream: decodes the text without cutting it. offset: where the text begins. lists_all: tokens that are not shown
        are listed too, with empty texts.
        """
        self._texts = texts
        self._stream = stream
        self._offset = offset
        self.lists_all = lists_all
        self._pending: deque[_Read] = deque()
        self._length = 0
        self._num_shown = 0

    def read(self, tokens: Iterable[ScoredToken]) -> None:
        """Take in the next tokens."""
        for token in tokens:
            text = self._stream.add([token.id])
            own = self._texts.behind(token.id)
            if (
                self._pending
                and not self._pending[-1].text
                and own
                and _HALF not in own
                and text.endswith(own)
            ):
                # The tokens before it never became a character, so their U+FFFD belongs to them.
                self._lengthen_last(text.removesuffix(own))
                text = own
            self._pending.append(_Read(token, self._length, text))
            self._length += len(text)

    def show(self, text: str, lead: str) -> list[ListedToken]:
        """Return the tokens that are complete once `text` is shown too. lead: the text cut off at the beginning."""
        self._num_shown += len(text)
        end = len(lead) + self._num_shown
        listed = []
        while self._pending and self._pending[0].end <= end and self._pending[0].start < end:
            listed.append(self._listed(self._pending.popleft(), lead, end))
        return listed

    def rest(self, lead: str) -> list[ListedToken]:
        """Return the remaining tokens at the end of the text; hidden ones only if all are listed."""
        if self._pending:
            self._lengthen_last(self._stream.finish())
        end = len(lead) + self._num_shown
        is_cut = end < self._length
        shown = [read for read in self._pending if self.lists_all or not is_cut or read.start < end]
        return [self._listed(read, lead, end) for read in shown]

    def _lengthen_last(self, more: str) -> None:
        last = self._pending.pop()
        self._pending.append(_Read(last.token, last.start, last.text + more))
        self._length += len(more)

    def _listed(self, read: _Read, lead: str, end: int) -> ListedToken:
        token, start = read.token, max(read.start, len(lead))
        alone = self._texts.alone(token.id)
        text = read.text[max(0, len(lead) - read.start) : max(0, end - read.start)]
        if _HALF in alone and read.start < end:
            text = alone
        is_first = read.start == 0 and not self._stream.goes_on
        spell = self._texts.alone if is_first else self._texts.behind
        tops = [
            (spell(i).removeprefix(lead if is_first else ""), logprob) for i, logprob in token.top_logprobs
        ]
        return ListedToken(text, self._offset + min(start, end) - len(lead), token.logprob, tops)
