"""One thread that owns one model and answers whatever is handed to it, all at once.

Responsible for: the way of requests into the running batch, of tokens out of it, and of cancellations.
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
from dovetail.engine.answers import Answer, DecodeText, FinishReason, TopLogprobs
from dovetail.engine.prompt_scores import TokenScore
from dovetail.engine.scheduler import Load
from dovetail.errors import DovetailError, GenerationError
from dovetail.telemetry.log import warn

_LOOK_EVERY_SECONDS = 0.1
_FAILURES_IN_A_ROW = 3
"""Batches that failed one after the other: the fault lies in none of them."""

Post = Callable[[Callable[[], None]], object]
"""Runs a function where the listeners live, such as an event loop's `call_soon_threadsafe`."""


class QueueFull(DovetailError):
    """More requests wait already than may."""


class EngineFailed(DovetailError):
    """The model failed while it answered; not the request's fault."""


@dataclass(frozen=True, slots=True)
class Progress:
    """What a request has got since it was last told."""

    token_ids: Sequence[int] = ()
    logprobs: Sequence[float] = ()
    top_logprobs: Sequence[TopLogprobs] = ()
    """Of each token, where they were asked for."""
    prompt_scores: Sequence[TokenScore] = ()
    """The scores of the prompt's tokens but the first, told once where they were asked for."""
    finish_reason: FinishReason | None = None
    error: Exception | None = None
    """The engine failed; nothing more will come."""


@dataclass(slots=True, eq=False)
class Ticket:
    """One request under way."""

    prompt_ids: Sequence[int]
    sampling: Sampling
    seed: int
    on_progress: Callable[[Progress], None]
    num_prompt_top: int | None = None
    """The number of likeliest tokens to list at each place of the prompt; None: it is not scored."""
    prompt_scores: Sequence[TokenScore] = ()
    num_told: int = 0
    is_cancelled: bool = False
    answer: Answer = field(init=False)

    def __post_init__(self) -> None:
        self.answer = Answer(
            0, tuple(self.prompt_ids), self.sampling, self.seed, self.sampling.max_new_tokens
        )

    def news(self) -> Progress | None:
        """What has come since the last call; None: nothing."""
        ids, answer = self.answer.token_ids, self.answer
        if len(ids) == self.num_told and answer.finish_reason is None:
            return None
        new = slice(self.num_told, len(ids))
        self.num_told = len(ids)
        scores, self.prompt_scores = self.prompt_scores, ()
        return Progress(
            ids[new], answer.logprobs[new], answer.top_logprobs[new], scores, answer.finish_reason
        )


class PromptScores:
    """Scores of the prompts that arrived together: each is computed once, however many answers are drawn to it."""

    def __init__(self, serve: Serve | None) -> None:
        assert serve is not None
        self._serve = serve
        self._scores: dict[tuple[Sequence[int], int], Sequence[TokenScore]] = {}

    def give(self, ticket: Ticket) -> None:
        """Put the scores on the ticket if it asks for them. Raises what the model fails with."""
        if ticket.num_prompt_top is None:
            return
        key = (ticket.answer.prompt, ticket.num_prompt_top)
        if key not in self._scores:
            self._scores[key] = self._serve.prompt_scores(*key)
        ticket.prompt_scores = self._scores[key]


class EngineThread:
    """Start it, submit tickets from any thread, close it. Listeners are called through `post`."""

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
        """What ended the thread for good."""
        self._num_failures = 0
        """Of batches, since the last token was drawn."""
        self._post: Post | None = None
        self._thread: threading.Thread | None = None
        self.load = Load(0, 0, 0)
        """As of the last step."""

    @property
    def max_tokens(self) -> int:
        """The most tokens of prompt and answer together."""
        assert self._serve is not None
        return self._serve.max_tokens

    @property
    def can_answer(self) -> bool:
        """Return whether the engine runs and has not failed again and again since it drew its last token."""
        is_alive = self._thread is not None and self._thread.is_alive()
        return is_alive and self._num_failures < _FAILURES_IN_A_ROW

    def start(self, post: Post) -> None:
        """Begin; returns when requests can come. Raises what keeps the model from being served."""
        self._post = post
        ready = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(ready,), name="engine", daemon=True)
        self._thread.start()
        ready.wait()
        if self._failure is not None:
            raise self._failure

    def submit(self, tickets: Sequence[Ticket]) -> None:
        """Let these join the batch, all or none. Raises GenerationError for what cannot be generated, QueueFull
        when too many wait.
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
        """Nobody wants these any more: their pages are free before the next step."""
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
        """Answer every prompt, for a thread that can wait: where no more requests may wait, it does.

        Once `is_cancelled` says so the rest ends early. Raises what the engine fails with.
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
        """Leave what is under way, and end the thread."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def poll(self, load: Load) -> Sequence[Answer] | None:
        """Called by the engine between two steps."""
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
        """Score the prompt where that is asked for; return False where that failed, which the listener is told."""
        try:
            scored.give(ticket)
        except Exception as error:  # most often memory; the others' answers go on
            warn(f"a prompt could not be scored: {error}\n{traceback.format_exc()}")
            with self._changed:
                self._under_way.remove(ticket)
            self._tell([(ticket, Progress(error=EngineFailed(f"the prompt could not be scored: {error}")))])
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
        except Exception as error:  # whatever it is, start() or submit() raises it where somebody sees it
            with self._changed:
                self._failure = error
                left, self._arrived, self._under_way = [*self._under_way, *self._arrived], [], []
            ready.set()
            self._tell([(ticket, Progress(error=_ended(error))) for ticket in left])

    def _answer(self) -> None:
        """Until the thread is to end, or the engine fails; then it can be tried again."""
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
            self._tell([(ticket, Progress(error=reason)) for ticket in failed])
            if isinstance(error, torch.AcceleratorError):
                raise  # the process has lost the device: nothing it computes there is right any more

    def _report(self) -> None:
        """Tell everybody what they got; let go who has all."""
        news = [(ticket, progress) for ticket in self._under_way if (progress := ticket.news()) is not None]
        if not news:
            return
        self._num_failures = 0
        with self._changed:
            self._under_way = [ticket for ticket in self._under_way if not ticket.answer.finish_reason]
        self._tell(news)

    def _tell(self, news: Sequence[tuple[Ticket, Progress]]) -> None:
        """One message a step, however many answers."""
        assert self._post is not None

        def deliver() -> None:
            for ticket, progress in news:
                ticket.on_progress(progress)

        self._post(deliver)


def _ended(failure: Exception) -> EngineFailed:
    return EngineFailed(f"the engine has failed for good: {failure}", hint="start the server again")
