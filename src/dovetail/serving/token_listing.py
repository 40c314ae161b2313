"""The tokens of a text beside it, so that joined they are the text.

Responsible for: which part of the text is whose token, where it begins, and which tokens the text does not show.
Not responsible for: the text (text/text_stream.py), the JSON of the list (responses.py).

A token alone does not say how it reads: SentencePiece writes its space only behind another token. Of a token that is
a part of a character, U+FFFD stands for its share.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dovetail.engine.answers import TopLogprobs
from dovetail.text.chat_format import ChatFormat
from dovetail.text.text_stream import TextStream

_HALF = "\ufffd"


@dataclass(frozen=True, slots=True)
class ScoredToken:
    """A token and how likely it was at its place."""

    id: int
    logprob: float | None
    """None: it is the first of a text, before which there is nothing."""
    top_logprobs: TopLogprobs = ()
    """The likeliest at its place, if they were asked for."""


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
        """Return its text at the beginning of a text."""
        return self.decode([token_id])

    def behind(self, token_id: int) -> str:
        """Return its text behind another token."""
        return self.decode([*self._front, token_id])[self._num_front :]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of some tokens, special ones as they are written."""
        return str(self._tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))


@dataclass(frozen=True, slots=True)
class _Read:
    """A token and its part of the text, before anything is taken off."""

    token: ScoredToken
    start: int
    text: str

    @property
    def end(self) -> int:
        return self.start + len(self.text)


class TokenListing:
    """The tokens of one text: read them, say what of the text is shown, and get those that are shown with it."""

    def __init__(
        self, texts: TokenTexts, stream: TextStream, *, offset: int = 0, lists_all: bool = False
    ) -> None:
        """stream: writes the text, of which nothing is taken off. offset: of its beginning. lists_all: tokens that are
        not shown are listed too, as nothing.
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
                # The parts before it never became a character; their U+FFFD is theirs.
                self._lengthen_last(text.removesuffix(own))
                text = own
            self._pending.append(_Read(token, self._length, text))
            self._length += len(text)

    def show(self, text: str, lead: str) -> list[ListedToken]:
        """Return the tokens that are whole in the text once `text` is shown too. lead: what its beginning lost."""
        self._num_shown += len(text)
        end = len(lead) + self._num_shown
        listed = []
        while self._pending and self._pending[0].end <= end and self._pending[0].start < end:
            listed.append(self._listed(self._pending.popleft(), lead, end))
        return listed

    def rest(self, lead: str) -> list[ListedToken]:
        """Return the other tokens at the end of the text, without those that it does not show."""
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
