"""From tickets to text: the answers to one request, piece by piece.

Responsible for: submitting, text and log-probabilities of what was drawn, and cancelling what nobody reads.
Not responsible for: the shape of responses (routes.py).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from dovetail.engine import Sampling
from dovetail.engine.answers import TopLogprobs
from dovetail.serving.engine_thread import Progress, Ticket
from dovetail.serving.meters import Meters
from dovetail.serving.served_model import ServedModel
from dovetail.text.text_stream import TextStream

_SEED_STRIDE = 1_000_003
"""Between the answers to one request; the first takes the request's own seed."""


@dataclass(frozen=True, slots=True)
class DrawnToken:
    """A token of an answer."""

    id: int
    logprob: float
    top_logprobs: TopLogprobs
    """Empty unless they were asked for."""


@dataclass(frozen=True, slots=True)
class Piece:
    """What one answer has got since its last piece."""

    index: int
    text: str
    tokens: Sequence[DrawnToken]
    """Without the token that ended the answer."""
    finish_reason: Literal["stop", "length"] | None


class Answering:
    """The answers to one request: iterate over their pieces, then close, or close early to cancel."""

    def __init__(
        self,
        model: ServedModel,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        seed: int,
        num_choices: int,
        new_stream: Callable[[Sequence[str]], TextStream],
        meters: Meters,
    ) -> None:
        """`num_choices` for each prompt, in order. new_stream: takes the stop strings.

        Raises what `EngineThread.submit` raises.
        """
        self._model = model
        self._meters = meters
        self._began = time.perf_counter()
        self._news: asyncio.Queue[tuple[int, Progress]] = asyncio.Queue()
        self._stop_token_ids = frozenset(sampling.stop_token_ids)
        self._tickets = [
            Ticket(prompt, sampling, seed + _SEED_STRIDE * index, partial(self._hear, index))
            for index, prompt in enumerate(prompt for prompt in prompts for _ in range(num_choices))
        ]
        self._streams = [new_stream(sampling.stop_strings) for _ in self._tickets]
        self.num_prompt_tokens = sum(map(len, prompts))
        self.num_tokens = 0
        """Drawn so far, in all answers, the tokens that ended them included."""
        model.thread.submit(self._tickets)
        meters.prompt(model.name, self.num_prompt_tokens)

    def __len__(self) -> int:
        return len(self._tickets)

    async def __aiter__(self) -> AsyncIterator[Piece]:
        """Raises what the engine failed with."""
        num_unfinished = len(self._tickets)
        while num_unfinished:
            index, progress = await self._news.get()
            if progress.error is not None:
                raise progress.error
            if not self.num_tokens:
                self._meters.first_token(self._model.name, time.perf_counter() - self._began)
            self.num_tokens += len(progress.token_ids)
            num_unfinished -= progress.finish_reason is not None
            yield self._piece(index, progress)

    def close(self) -> None:
        """Cancel what is not finished."""
        self._model.thread.cancel(self._tickets)
        self._meters.drawn(self._model.name, self.num_tokens)

    def _hear(self, index: int, progress: Progress) -> None:
        self._news.put_nowait((index, progress))

    def _piece(self, index: int, progress: Progress) -> Piece:
        stream, reason = self._streams[index], progress.finish_reason
        assert reason != "cancelled", "only a closed Answering cancels"
        tops = progress.top_logprobs or [()] * len(progress.token_ids)
        drawn = zip(progress.token_ids, progress.logprobs, tops, strict=True)
        kept = [DrawnToken(*token) for token in drawn if token[0] not in self._stop_token_ids]
        text = stream.add(progress.token_ids)
        if reason is not None:
            text += stream.finish()
        return Piece(index, text, kept, reason)
