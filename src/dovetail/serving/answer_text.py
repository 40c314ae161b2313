"""Turn the tokens of one answer into the text that is shown, and list its tokens and its prompt if requested.

Responsible for: which part of an answer is shown when. Not responsible for: the part of the text that belongs to each
token (token_listing.py), JSON (responses.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dovetail.engine.prompt_scores import TokenScore
from dovetail.engine.scheduler import TopLogprobs
from dovetail.serving.engine_thread import Progress
from dovetail.serving.token_listing import ListedToken, ScoredToken, TokenListing, TokenTexts
from dovetail.text.chat_format import ChatFormat
from dovetail.text.text_stream import TextStream


@dataclass(frozen=True, slots=True)
class Echo:
    """A prompt that a response repeats before its answer."""

    text: str
    ids: Sequence[int]
    added: str
    """The text that the tokenizer added in front: its first token, or a space."""

    @classmethod
    def of(cls, prompt: str | Sequence[int], ids: Sequence[int], chat: ChatFormat) -> Echo:
        """Make the echo of a prompt: its text as given, or as the model reads it where the tokenizer changes it."""
        read = TokenTexts(chat).decode(ids)
        if isinstance(prompt, str) and read.endswith(prompt):
            return cls(prompt, ids, read.removesuffix(prompt))
        return cls(read, ids, "")

    def listed(self, texts: TokenTexts, scores: Sequence[TokenScore], count: int) -> list[ListedToken]:
        """List all tokens of the prompt, each with the `count` likeliest tokens at its place."""
        listing = TokenListing(texts, TextStream(texts.decode), lists_all=True)
        listing.read([ScoredToken(self.ids[0], None)])
        for token_id, score in zip(self.ids[1:], scores, strict=True):
            listing.read([ScoredToken(token_id, score.logprob, score.top_logprobs[:count])])
        return [*listing.show(self.text, self.added), *listing.rest(self.added)]


class AnswerText:
    """The text and tokens of one answer that are shown, piece by piece."""

    def __init__(
        self,
        chat: ChatFormat,
        stream: TextStream,
        *,
        behind: Sequence[int] = (),
        echo: Echo | None = None,
        num_top: int | None = None,
    ) -> None:
        """Prepare to show one answer.

        behind: tokens whose text the answer continues. num_top: list the answer's tokens, each with this many of the
        likeliest at its place; None: do not list them.
        """
        self._stream = stream
        self._stop_token_ids = frozenset(chat.stop_token_ids)
        self._echo = echo
        self._num_top = num_top
        self._texts = self._listing = None
        if num_top is not None:
            self._texts = TokenTexts(chat)
            self._listing = TokenListing(
                self._texts,
                chat.text_stream(behind=behind),
                offset=len(echo.text) if echo else 0,
                lists_all=echo is not None,
            )

    def read(self, progress: Progress) -> tuple[str, list[ListedToken]]:
        """Return the text and the listed tokens that `progress` adds."""
        before, listed = self._prompt(progress.prompt_scores)
        text = self._stream.add(progress.token_ids)
        if progress.finish_reason is not None:
            text += self._stream.finish()
        if self._listing is not None:
            lead = self._stream.taken_lead
            self._listing.read(self._drawn(progress))
            listed += self._listing.show(text, lead)
            if progress.finish_reason is not None:
                listed += self._listing.rest(lead)
        return before + text, listed

    def _prompt(self, scores: Sequence[TokenScore]) -> tuple[str, list[ListedToken]]:
        """Return the echoed prompt and its tokens on the first call, nothing on later ones."""
        echo, self._echo = self._echo, None
        if echo is None:
            return "", []
        if self._texts is None or self._num_top is None:
            return echo.text, []
        return echo.text, echo.listed(self._texts, scores, self._num_top)

    def _drawn(self, progress: Progress) -> Iterable[ScoredToken]:
        """Yield the sampled tokens; the stop token only if all tokens are listed."""
        tops: Sequence[TopLogprobs] = progress.top_logprobs or [()] * len(progress.token_ids)
        assert self._listing is not None
        for token_id, logprob, top in zip(progress.token_ids, progress.logprobs, tops, strict=True):
            if self._listing.lists_all or token_id not in self._stop_token_ids:
                yield ScoredToken(token_id, logprob, top)
