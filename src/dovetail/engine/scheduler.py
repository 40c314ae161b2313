"""The choice of the sequences that run now: continuous batching within the pages there are.

Responsible for: admission by free pages, the parts of prompts that are read next, shared beginnings, a page for
every next token, preemption when pages run out.
Not responsible for: computing anything (paged.py).

The oldest running sequence is never preempted, and every request fits the arena alone, so all of them end.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from dovetail.engine.answers import Answer
from dovetail.engine.kv_cache import PAGE_TOKENS, KVArena, PagePool, pages_for


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
        """Whether everything the sequence has is stored after it, so that its next token can be drawn."""
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
        return self._num_missing() > self._pool.num_free

    def make_room(self) -> list[Answer]:
        """Take a page for every running answer's next token; returns the preempted answers, the youngest ones."""
        preempted: list[Answer] = []
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
            self._release(finished)
        return finished

    def load(self) -> Load:
        """Return the numbers of running and waiting answers, and of used pages."""
        return Load(len(self.running), len(self.waiting), self._pool.num_used)

    def drop_ended(self) -> list[Answer]:
        """Remove answers that were ended from outside, waiting or running; returns those that ran."""
        if any(answer.finish_reason for answer in self.waiting):
            self.waiting = deque(answer for answer in self.waiting if not answer.finish_reason)
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
        """Take pages for all its tokens, sharing full ones of an equal prompt; False if too few are free."""
        donor = self._first_with.get(answer.prompt) if self._shares_beginnings else None
        shared: list[int] = []
        if donor is not None:
            # The last token is read in any case: its logits are wanted.
            shared = donor.pages[: min(donor.num_cached, len(answer.prompt) - 1) // PAGE_TOKENS]
        needed = pages_for(answer.num_tokens) - len(shared)
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

    def _release(self, answers: list[Answer]) -> None:
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
