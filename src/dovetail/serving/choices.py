"""Produce the answers to one request as text, piece by piece.

Responsible for: submitting tickets, and cancelling answers that are no longer read. Not responsible for: text and
tokens of one answer (answer_text.py), the shape of responses (responses.py).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from dovetail.engine import Sampling
from dovetail.engine.prompt_scores import TokenScore
from dovetail.serving.answer_text import AnswerText
from dovetail.serving.engine_thread import Progress, Ticket
from dovetail.serving.meters import Meters
from dovetail.serving.served_model import ServedModel
from dovetail.serving.token_listing import ListedToken

_SEED_STRIDE = 1_000_003
"""The distance between the seeds of the answers to one request; the first takes the request's own seed."""


@dataclass(frozen=True, slots=True)
class Piece:
    """The part of one answer that is new since its last piece."""

    index: int
    text: str
    tokens: Sequence[ListedToken]
    """The tokens of the text, if they are listed."""
    finish_reason: Literal["stop", "length"] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """The prompts of one request, and the settings for answering them."""

    prompts: Sequence[Sequence[int]]
    sampling: Sampling
    seed: int
    num_choices: int
    """The number of answers to each prompt."""
    num_prompt_top: int | None = None
    """The number of likeliest tokens to list at each place of the prompts; None: they are not scored."""


class Answering:
    """The answers to one request. Iterate over their pieces, then close it; closing it early cancels the rest."""

    def __init__(
        self, model: ServedModel, wanted: Wanted, new_text: Callable[[int], AnswerText], meters: Meters
    ) -> None:
        """Submit the request to the model's engine. Raises what `EngineThread.submit` raises.

        new_text: makes the `AnswerText` of an answer to the prompt with this index.
        """
        self._model = model
        self._meters = meters
        self._began = time.perf_counter()
        self._news: asyncio.Queue[tuple[int, Progress]] = asyncio.Queue()
        indices = range(len(wanted.prompts) * wanted.num_choices)
        self.prompts = [wanted.prompts[index // wanted.num_choices] for index in indices]
        """The prompt of each answer."""
        self._tickets = [
            Ticket(
                self.prompts[index],
                wanted.sampling,
                wanted.seed + _SEED_STRIDE * index,
                partial(self._hear, index),
                wanted.num_prompt_top,
            )
            for index in indices
        ]
        self._texts = [new_text(index // wanted.num_choices) for index in indices]
        self.prompt_scores: list[Sequence[TokenScore]] = [() for _ in indices]
        """The scores of each answer's prompt, from its first piece on, if they were requested."""
        self.num_prompt_tokens = sum(map(len, wanted.prompts))
        self.num_tokens = 0
        """The number of tokens sampled so far in all answers, stop tokens included."""
        model.thread.submit(self._tickets)
        meters.prompt(model.name, self.num_prompt_tokens)

    def __len__(self) -> int:
        return len(self._tickets)

    async def __aiter__(self) -> AsyncIterator[Piece]:
        """Yield the pieces as they arrive. Raises the error that the engine failed with."""
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
        """Cancel the answers that are not finished."""
        self._model.thread.cancel(self._tickets)
        self._meters.drawn(self._model.name, self.num_tokens)

    def _hear(self, index: int, progress: Progress) -> None:
        self._news.put_nowait((index, progress))

    def _piece(self, index: int, progress: Progress) -> Piece:
        reason = progress.finish_reason
        assert reason != "cancelled", "only a closed Answering cancels"
        self.prompt_scores[index] = progress.prompt_scores or self.prompt_scores[index]
        return Piece(index, *self._texts[index].read(progress), reason)
