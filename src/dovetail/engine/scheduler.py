"""The answers in progress, and the choice of those that run now: continuous batching within the pages there are.

Responsible for: the tokens of an answer and when it stops; admission by free pages, the parts of prompts that are
read next, shared beginnings, a page for every next token, preemption when pages run out.
Not responsible for: computing anything (paged.py).

The oldest running sequence is never preempted, and every request fits the arena alone, so all of them end.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from dovetail.engine.kv_cache import PAGE_TOKENS, KVArena, PagePool, pages_for
from dovetail.engine.sampling import Sampling
from dovetail.errors import GenerationError

FinishReason = Literal["stop", "length", "cancelled"]
OnToken = Callable[[int, int, float], object]
"""on_token(request_index, token_id, logprob), as each token is drawn; a true result cancels the request."""
DecodeText = Callable[[Sequence[int]], str]
"""decode_text(token_ids): the text of some tokens, needed for stop strings only."""


TopLogprobs = Sequence[tuple[int, float]]
"""The likeliest tokens at one place with their log-probabilities, the likeliest first; none that cannot be drawn."""


@dataclass(frozen=True, slots=True)
class Completion:
    """The tokens generated for one prompt."""

    token_ids: tuple[int, ...]
    """The answer, the stop token included."""
    logprobs: tuple[float, ...]
    """The log-probability of each token under the distribution it was drawn from."""
    finish_reason: FinishReason
    """"stop": a stop token or string; "length": the token limit or the context; "cancelled": by on_token."""


@dataclass(frozen=True, slots=True)
class Listener:
    """The callbacks of the caller of a generation: one for each token, one that decodes text."""

    on_token: OnToken | None = None
    decode_text: DecodeText | None = None


@dataclass(slots=True, eq=False)
class Answer:
    """A request and what it has produced so far."""

    index: int
    """Its place among the requests of the caller."""
    prompt: tuple[int, ...]
    sampling: Sampling
    seed: int
    max_new_tokens: int
    """The number asked for, or less where context or cache end sooner."""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[TopLogprobs] = field(default_factory=list)
    """The likeliest tokens at each token's place, if the sampling settings ask for them."""
    pages: list[int] = field(default_factory=list)
    """Pages of the KV cache that hold its tokens, in order; empty while it waits. Full ones may be shared."""
    num_cached: int = 0
    """Tokens whose keys and values are stored, or will be by the forwards under way."""
    num_pending: int = 0
    """Tokens drawn on the device that the host has not read yet."""
    finish_reason: FinishReason | None = None
    keeps_pages: bool = False
    """True if its pages stay after its end, for a request that continues it, until others need them."""
    continues: Answer | None = None
    """The ended request whose tokens the prompt begins with; only what is new is read, if its pages are still there."""

    @property
    def num_tokens(self) -> int:
        """The length of prompt and answer, pending tokens included."""
        return len(self.prompt) + self.num_drawn

    @property
    def num_drawn(self) -> int:
        """Tokens of the answer, pending ones included; also the index of the next random number."""
        return len(self.token_ids) + self.num_pending

    @property
    def is_unread(self) -> bool:
        """Return whether a part of the prompt, or of what was drawn before a preemption, is yet to be read."""
        return self.num_cached < self.num_tokens - min(1, self.num_drawn)

    @property
    def can_decode(self) -> bool:
        """Return whether its last token is drawn and not yet fed, and another one is wanted."""
        return (
            self.finish_reason is None
            and 0 < self.num_drawn < self.max_new_tokens
            and self.num_cached == self.num_tokens - 1
        )

    @property
    def all_ids(self) -> tuple[int, ...]:
        """The tokens that the host knows."""
        return (*self.prompt, *self.token_ids)

    @property
    def max_tokens(self) -> int:
        """The greatest length that this sequence can reach."""
        return len(self.prompt) + self.max_new_tokens

    def accept(self, token_id: int, logprob: float, listener: Listener, likeliest: TopLogprobs = ()) -> None:
        """Take in one drawn token; afterwards `finish_reason` says whether it was the last.

        likeliest: the likeliest tokens at its place, as many as any request of the batch asked for.
        """
        self.token_ids.append(token_id)
        self.logprobs.append(logprob)
        if self.sampling.top_logprobs:
            self.top_logprobs.append(likeliest[: self.sampling.top_logprobs])
        cancelled = listener.on_token is not None and listener.on_token(self.index, token_id, logprob)
        if token_id in self.sampling.stop_token_ids or self._completes_a_stop_string(listener):
            self.finish_reason = "stop"
        elif cancelled:
            self.finish_reason = "cancelled"
        elif len(self.token_ids) >= self.max_new_tokens:
            self.finish_reason = "length"

    def completion(self) -> Completion:
        assert self.finish_reason is not None
        return Completion(tuple(self.token_ids), tuple(self.logprobs), self.finish_reason)

    def _completes_a_stop_string(self, listener: Listener) -> bool:
        strings = self.sampling.stop_strings
        if not strings or listener.decode_text is None:
            return False
        # A token may be one byte of a four-byte character, and the first few may be the end of a broken one.
        tail = 4 * max(map(len, strings)) + 8
        text = listener.decode_text(self.token_ids[-tail:])
        return any(string in text for string in strings)


def expect_usable(answer: Answer, *, vocabulary: int, context: int | None, listener: Listener) -> None:
    """Raise GenerationError, naming the request, unless it can be generated."""
    where = f"request {answer.index}"
    if not answer.prompt:
        raise GenerationError(
            f"{where}: the prompt is empty", hint="begin it with a token, such as BOS or a space"
        )
    if context is not None and len(answer.prompt) >= context:
        raise GenerationError(
            f"{where}: the prompt has {len(answer.prompt)} tokens, the model's context is {context}",
            hint=f"shorten it to at most {context - 1} tokens, so that one more fits",
        )
    for kind, ids in (("prompt token", answer.prompt), ("stop token", answer.sampling.stop_token_ids)):
        if min(ids, default=0) < 0 or max(ids, default=0) >= vocabulary:
            unknown = next(i for i in ids if not 0 <= i < vocabulary)
            raise GenerationError(
                f"{where}: {kind} {unknown} is not in the model's vocabulary of {vocabulary}",
                hint="use the tokenizer that belongs to this model",
            )
    if answer.sampling.stop_strings and listener.decode_text is None:
        raise GenerationError(
            f"{where}: stop strings need text, and no decode_text was given",
            hint="pass decode_text=tokenizer.decode to generate, or use stop_token_ids",
        )


@dataclass(frozen=True, slots=True)
class Chunk:
    """The tokens of one sequence that a forward reads: places `start` to `end` - 1."""

    answer: Answer
    start: int
    end: int

    @property
    def num_tokens(self) -> int:
        return self.end - self.start

    @property
    def is_last(self) -> bool:
        """Return whether everything the sequence has is stored after it, so that its next token can be drawn."""
        return self.end == self.answer.num_tokens


@dataclass(frozen=True, slots=True)
class Load:
    """The numbers of answers and pages in use."""

    num_running: int
    num_waiting: int
    num_pages: int
    """The pages of the KV cache in use."""

    @property
    def is_idle(self) -> bool:
        return not self.num_running and not self.num_waiting


class Scheduler:
    """The waiting and the running answers of one call to generate."""

    def __init__(
        self,
        answers: Iterable[Answer],
        arena: KVArena,
        *,
        max_running: int,
        max_prefill_tokens: int,
        shares_beginnings: bool = True,
    ) -> None:
        """Keep the settings.

        shares_beginnings: the keys of a token depend only on the tokens before it, so answers may share them.
        """
        self.waiting = deque(answers)
        self.running: list[Answer] = []
        self.num_preempted = 0
        self.num_shared_tokens = 0
        """The prompt tokens that did not have to be read because another sequence had them."""
        self.version = 0
        """A number that changes with every change of a page table."""
        self._arena = arena
        self._pool = PagePool(arena.num_pages)
        self._max_running = max_running
        self._max_prefill_tokens = max_prefill_tokens
        self._shares_beginnings = shares_beginnings
        self._kept: list[Answer] = []
        """The ended answers that keep their pages, the oldest first."""
        self._first_with: dict[tuple[int, ...], Answer] = {}
        """For each prompt, the running answer whose pages the other answers to it share."""

    def admit(self) -> list[Chunk]:
        """Return what the next forward reads: first the rest of prompts begun, then waiting answers, in order.

        Pages, places and `max_prefill_tokens` limit it. A long prompt is read in several forwards, so that the others
        decode in between.
        """
        room = self._max_prefill_tokens
        chunks: list[Chunk] = []
        for answer in self.running:
            if room > 0 and answer.is_unread:
                chunks.append(self._next_chunk(answer, room))
                room -= chunks[-1].num_tokens
        places = self._num_places()
        while room > 0 and places > 0 and self._give_pages(self.waiting[0]):
            places -= 1
            self.running.append(self.waiting.popleft())
            chunks.append(self._next_chunk(self.running[-1], room))
            room -= chunks[-1].num_tokens
        return chunks

    def ready(self) -> list[Answer]:
        """Return the answers that can decode another token now."""
        return [answer for answer in self.running if answer.can_decode]

    def is_short_of_pages(self) -> bool:
        """Return whether `make_room` would have to preempt, which needs that no running answer has a pending token."""
        self._free_kept(self._num_missing())
        return self._num_missing() > self._pool.num_free

    def make_room(self) -> list[Answer]:
        """Take a page for every running answer's next token; returns the preempted answers, the youngest ones."""
        preempted: list[Answer] = []
        self._free_kept(self._num_missing())
        while self._num_missing() > self._pool.num_free:
            preempted.append(self.running[-1])
            self.send_back(preempted[-1:])
        grown: list[int] = []
        for answer in self.running:
            missing = _missing_pages(answer)
            if missing > 0:
                self._pool.take(answer.pages, missing)
                grown += answer.pages[-missing:]
        if grown:
            self.version += 1
            self._clear(grown)
        return preempted

    def send_back(self, answers: list[Answer]) -> None:
        """Let running answers wait again; their tokens will be read anew."""
        assert all(answer.num_pending == 0 for answer in answers)
        self.running = [answer for answer in self.running if answer not in answers]
        if answers:
            self._release(answers)
        self.waiting.extendleft(reversed(answers))
        self.num_preempted += len(answers)

    def retire(self) -> list[Answer]:
        """Remove finished answers; returns them."""
        finished = [answer for answer in self.running if answer.finish_reason]
        if finished:
            self.running = [answer for answer in self.running if not answer.finish_reason]
            # A lone sequence has the first pages, and other keys of a longer rope cannot be gone on with.
            may_keep = self._shares_beginnings and not self._arena.lone
            self._kept += [answer for answer in finished if answer.keeps_pages and may_keep]
            self._release([answer for answer in finished if not (answer.keeps_pages and may_keep)])
        return finished

    def load(self) -> Load:
        """Return the numbers of running and waiting answers, and of used pages."""
        return Load(len(self.running), len(self.waiting), self._pool.num_used)

    def drop_ended(self) -> list[Answer]:
        """Remove answers that were ended from outside, waiting or running; returns those that ran."""
        if any(answer.finish_reason for answer in self.waiting):
            self.waiting = deque(answer for answer in self.waiting if not answer.finish_reason)
        self._release([answer for answer in self._kept if not answer.keeps_pages])
        self._kept = [answer for answer in self._kept if answer.keeps_pages]
        return self.retire()

    def _num_places(self) -> int:
        """Return how many answers may start now.

        In a full batch places come free one by one, and reading one prompt costs a forward like reading many: there
        it waits until several are free.
        """
        places = min(len(self.waiting), self._max_running - len(self.running))
        is_full = len(self.running) > self._max_running * 3 // 4
        enough = min(len(self.waiting), self._max_running // 16) if is_full else 0
        return places if places >= enough else 0

    def _give_pages(self, answer: Answer) -> bool:
        """Take pages for all its tokens, beside those of the answer that it continues; False if too few are free."""
        before = answer.continues if answer.continues in self._kept else None
        if before is None:
            return self._share_pages(answer)
        needed = pages_for(answer.num_tokens) - len(before.pages)
        self._kept.remove(before)
        self._free_kept(needed + self._num_growing())
        if self.running and needed + self._num_growing() > self._pool.num_free:
            self._kept.append(before)
            return False
        if self._first_with.get(before.prompt) is before:
            del self._first_with[before.prompt]
        num_held = len(before.pages)
        answer.pages, before.pages, answer.continues = before.pages, [], None
        answer.num_cached = min(before.num_cached, len(before.all_ids) - 1)
        self._pool.take(answer.pages, needed)
        self._clear(answer.pages[num_held:])
        self.version += 1
        return True

    def _share_pages(self, answer: Answer) -> bool:
        """Take pages for all its tokens, sharing full ones of an equal prompt; False if too few are free."""
        donor = self._first_with.get(answer.prompt) if self._shares_beginnings else None
        shared: list[int] = []
        if donor is not None:
            # The last token is read in any case: its logits are wanted.
            shared = donor.pages[: min(donor.num_cached, len(answer.prompt) - 1) // PAGE_TOKENS]
        needed = pages_for(answer.num_tokens) - len(shared)
        self._free_kept(needed + self._num_growing(), but=donor)
        if self.running and needed + self._num_growing() > self._pool.num_free:
            return False
        self._pool.share(answer.pages, shared)
        self._pool.take(answer.pages, needed)
        self._clear(answer.pages[len(shared) :])
        answer.num_cached = len(shared) * PAGE_TOKENS
        self.num_shared_tokens += answer.num_cached
        self._first_with.setdefault(answer.prompt, answer)
        self.version += 1
        return True

    def _next_chunk(self, answer: Answer, room: int) -> Chunk:
        """Return up to `room` tokens, or one more: a last token left alone would look like one to decode."""
        start = answer.num_cached
        end = min(answer.num_tokens, start + room)
        if answer.num_drawn and end == answer.num_tokens - 1:
            end += 1
        answer.num_cached = end
        return Chunk(answer, start, end)

    def _num_missing(self) -> int:
        return sum(max(0, _missing_pages(answer)) for answer in self.running)

    def _num_growing(self) -> int:
        """Count the running answers that may still need a page; each keeps one in reserve.

        Without the reserve an answer would be admitted only to be preempted at once, its prefill wasted.
        """
        return sum(len(answer.pages) < pages_for(answer.max_tokens) for answer in self.running)

    def _free_kept(self, needed: int, *, but: Answer | None = None) -> None:
        """Free kept pages, the oldest first, until so many are free or none is kept; those of `but` stay."""
        for answer in [answer for answer in self._kept if answer is not but]:
            if self._pool.num_free >= needed:
                return
            self._kept.remove(answer)
            self._release([answer])

    def _release(self, answers: list[Answer]) -> None:
        if not answers:
            return
        for answer in answers:
            if self._first_with.get(answer.prompt) is answer:
                del self._first_with[answer.prompt]
            answer.num_cached = 0
        self._pool.free([answer.pages for answer in answers])
        self.version += 1
        if self._arena.dense:
            self._arena.move(self._pool.close_ranks())

    def _clear(self, pages: list[int]) -> None:
        if self._arena.dense:
            self._arena.clear(pages)


def _missing_pages(answer: Answer) -> int:
    return pages_for(answer.num_tokens) - len(answer.pages) if answer.can_decode else 0
