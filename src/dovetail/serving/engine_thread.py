"""Run one model in a thread of its own, which answers all submitted requests in one batch.

Responsible for: adding requests to the running batch, passing on their tokens, and cancelling requests.
Not responsible for: the batch (engine/), text (choices.py), HTTP (routes.py).
"""

from __future__ import annotations

import queue
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from dovetail.engine import Completion, HybridEngine, Sampling, Serve
from dovetail.engine.prompt_scores import TokenScore
from dovetail.engine.scheduler import Answer, DecodeText, FinishReason, Load, TopLogprobs
from dovetail.errors import DovetailError, GenerationError
from dovetail.telemetry.log import warn

_LOOK_EVERY_SECONDS = 0.1
_FAILURES_IN_A_ROW = 3
"""The number of batches that fail in a row before the fault is taken to lie in the engine, not in a batch."""

Post = Callable[[Callable[[], None]], object]
"""A callable that runs a function in the listeners' thread, such as an event loop's `call_soon_threadsafe`."""


class QueueFull(DovetailError):
    """The error of a request that comes when the queue is full."""


class EngineFailed(DovetailError):
    """The error of a request whose engine failed, through no fault of the request."""


@dataclass(frozen=True, slots=True)
class Progress:
    """The tokens that a request has got since its last progress, and whether it has ended."""

    token_ids: Sequence[int] = ()
    logprobs: Sequence[float] = ()
    top_logprobs: Sequence[TopLogprobs] = ()
    """The likeliest tokens at the place of each token, if they were requested."""
    prompt_scores: Sequence[TokenScore] = ()
    """The scores of the prompt's tokens except the first, sent once if they were requested."""
    finish_reason: FinishReason | None = None
    error: Exception | None = None
    """The error that the engine failed with; no more progress follows it."""


@dataclass(slots=True, eq=False)
class Ticket:
    """One running or waiting request."""

    prompt_ids: Sequence[int]
    sampling: Sampling
    seed: int
    on_progress: Callable[[Progress], None]
    num_prompt_top: int | None = None
    """The number of likeliest tokens to list at each place of the prompt; None: it is not scored."""
    prompt_scores: Sequence[TokenScore] = ()
    num_reported: int = 0
    is_cancelled: bool = False
    answer: Answer = field(init=False)

    def __post_init__(self) -> None:
        self.answer = Answer(
            0, tuple(self.prompt_ids), self.sampling, self.seed, self.sampling.max_new_tokens
        )

    def news(self) -> Progress | None:
        """Return the progress since the last call, or None if there is none."""
        ids, answer = self.answer.token_ids, self.answer
        if len(ids) == self.num_reported and answer.finish_reason is None:
            return None
        new = slice(self.num_reported, len(ids))
        self.num_reported = len(ids)
        scores, self.prompt_scores = self.prompt_scores, ()
        return Progress(
            ids[new], answer.logprobs[new], answer.top_logprobs[new], scores, answer.finish_reason
        )


class PromptScores:
    """The scores of prompts that arrived together. Each prompt is scored once, also if it gets several answers."""

    def __init__(self, serve: Serve | None) -> None:
        assert serve is not None
        self._serve = serve
        self._scores: dict[tuple[Sequence[int], int], Sequence[TokenScore]] = {}

    def give(self, ticket: Ticket) -> None:
        """Put the scores on the ticket if it asks for them. Raises the error that the model fails with."""
        if ticket.num_prompt_top is None:
            return
        key = (ticket.answer.prompt, ticket.num_prompt_top)
        if key not in self._scores:
            self._scores[key] = self._serve.prompt_scores(*key)
        ticket.prompt_scores = self._scores[key]


class EngineThread:
    """The thread of one engine. Tickets are submitted from any thread, and listeners are called through `post`."""

    def __init__(
        self, engine: HybridEngine, decode_text: DecodeText, *, max_running: int, max_waiting: int
    ) -> None:
        self._engine = engine
        self._decode_text = decode_text
        self._max_open = max_running + max_waiting
        self._changed = threading.Condition()
        self._arrived: list[Ticket] = []
        self._under_way: list[Ticket] = []
        self._is_closing = False
        self._serve: Serve | None = None
        self._failure: Exception | None = None
        """The error that ended the thread."""
        self._num_failures = 0
        """The number of batches that failed since the last token was sampled."""
        self._post: Post | None = None
        self._thread: threading.Thread | None = None
        self.load = Load(0, 0, 0)
        """The load at the last step."""

    @property
    def max_tokens(self) -> int:
        """The largest number of tokens of prompt and answer together."""
        assert self._serve is not None
        return self._serve.max_tokens

    @property
    def can_answer(self) -> bool:
        """Return whether the engine runs and has not failed repeatedly since it sampled its last token."""
        is_alive = self._thread is not None and self._thread.is_alive()
        return is_alive and self._num_failures < _FAILURES_IN_A_ROW

    def start(self, post: Post) -> None:
        """Start the thread, and wait until it takes requests. Raises the error that keeps it from serving the model."""
        self._post = post
        ready = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(ready,), name="engine", daemon=True)
        self._thread.start()
        ready.wait()
        if self._failure is not None:
            raise self._failure

    def submit(self, tickets: Sequence[Ticket]) -> None:
        """Add all tickets to the batch, or none. Raises GenerationError for a ticket that cannot be answered, QueueFull
        when too many wait, EngineFailed when the engine has ended or is ending.
        """
        assert self._serve is not None
        for ticket in tickets:
            self._serve.expect_usable(ticket.answer, self._decode_text)
        with self._changed:
            if self._is_closing:
                raise EngineFailed("the server is stopping", hint="try again when it is back")
            if self._failure is not None:
                raise _ended(self._failure)
            num_open = len(self._arrived) + len(self._under_way)
            if num_open + len(tickets) > self._max_open:
                raise QueueFull(
                    f"{num_open} answers are under way or wait, and {self._max_open} may",
                    hint="try again soon",
                )
            self._arrived += tickets
            self._changed.notify()

    def cancel(self, tickets: Sequence[Ticket]) -> None:
        """Cancel these tickets; their pages of the KV cache are freed before the next step."""
        with self._changed:
            for ticket in tickets:
                ticket.is_cancelled = True

    def complete(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        seeds: Sequence[int],
        is_cancelled: Callable[[], bool],
    ) -> list[Completion]:
        """Answer every prompt, and block the calling thread until all are answered, also while the queue is full.

        The rest ends early once `is_cancelled` returns true. Raises the error that the engine fails with.
        """
        heard: queue.SimpleQueue[Progress] = queue.SimpleQueue()
        tickets = [Ticket(ids, sampling, seed, heard.put) for ids, seed in zip(prompts, seeds, strict=True)]
        try:
            for ticket in tickets:
                self._submit_when_possible(ticket, is_cancelled)
            num_open = len(tickets)
            while num_open and not is_cancelled():
                try:
                    progress = heard.get(timeout=_LOOK_EVERY_SECONDS)
                except queue.Empty:
                    continue
                if progress.error is not None:
                    raise progress.error
                num_open -= progress.finish_reason is not None
        finally:
            self.cancel(tickets)
        return [
            Completion(tuple(answer.token_ids), tuple(answer.logprobs), answer.finish_reason or "cancelled")
            for answer in (ticket.answer for ticket in tickets)
        ]

    def close(self) -> None:
        """End the thread, and abandon the requests that it has."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def poll(self, load: Load) -> Sequence[Answer] | None:
        """Return the answers that join the batch, or None to end it; the engine calls this between two steps."""
        self.load = load
        self._report()
        with self._changed:
            while load.is_idle and not self._arrived and not self._is_closing:
                self._changed.wait()
            if self._is_closing:
                return None
            for ticket in self._under_way:
                if ticket.is_cancelled and ticket.answer.finish_reason is None:
                    ticket.answer.finish_reason = "cancelled"
            arrived = [ticket for ticket in self._arrived if not ticket.is_cancelled]
            self._arrived.clear()
            self._under_way += arrived
        scored = PromptScores(self._serve)
        return [ticket.answer for ticket in arrived if self._score_prompt(ticket, scored)]

    def _score_prompt(self, ticket: Ticket, scored: PromptScores) -> bool:
        """Score the prompt if that is requested; return False, and send the listener the error, if that fails."""
        try:
            scored.give(ticket)
        except Exception as error:  # most often too little memory; the other answers go on
            warn(f"a prompt could not be scored: {error}\n{traceback.format_exc()}")
            with self._changed:
                self._under_way.remove(ticket)
            self._send([(ticket, Progress(error=EngineFailed(f"the prompt could not be scored: {error}")))])
            return False
        return True

    def _submit_when_possible(self, ticket: Ticket, is_cancelled: Callable[[], bool]) -> None:
        while not is_cancelled():
            try:
                self.submit([ticket])
            except QueueFull:
                time.sleep(_LOOK_EVERY_SECONDS)
            else:
                return

    def _run(self, ready: threading.Event) -> None:
        try:
            with self._engine.serving() as self._serve:
                ready.set()
                while not self._is_closing:
                    self._answer()
        except Exception as error:  # start() or submit() raises it in the thread of its caller
            with self._changed:
                self._failure = error
                left, self._arrived, self._under_way = [*self._under_way, *self._arrived], [], []
            ready.set()
            self._send([(ticket, Progress(error=_ended(error))) for ticket in left])

    def _answer(self) -> None:
        """Answer requests until the thread is to end or a batch fails; after a failure it can be called again."""
        assert self._serve is not None
        try:
            self._serve(self, decode_text=self._decode_text)
        except Exception as error:  # the fault may lie in one batch: the next one is tried
            warn(f"generation failed: {error}\n{traceback.format_exc()}")
            reason = (
                error if isinstance(error, GenerationError) else EngineFailed(f"generation failed: {error}")
            )
            with self._changed:
                failed, self._under_way = self._under_way, []
            self._num_failures += 1
            self._send([(ticket, Progress(error=reason)) for ticket in failed])
            if isinstance(error, torch.AcceleratorError):
                raise  # the process has lost the device, and later results from there would be wrong

    def _report(self) -> None:
        """Send the listeners their progress, and remove the tickets that are finished."""
        news = [(ticket, progress) for ticket in self._under_way if (progress := ticket.news()) is not None]
        if not news:
            return
        self._num_failures = 0
        with self._changed:
            self._under_way = [ticket for ticket in self._under_way if not ticket.answer.finish_reason]
        self._send(news)

    def _send(self, news: Sequence[tuple[Ticket, Progress]]) -> None:
        """Send the progress of all tickets of a step in one call of `post`."""
        assert self._post is not None

        def deliver() -> None:
            for ticket, progress in news:
                ticket.on_progress(progress)

        self._post(deliver)


def _ended(failure: Exception) -> EngineFailed:
    return EngineFailed(f"the engine has failed for good: {failure}", hint="start the server again")
