"""Which sequences run now: continuous batching within the pages there are.

Responsible for: admission by free pages, a page for every next token, preemption when pages run out.
Not responsible for: computing anything; its counterpart that does is hybrid.py.

The oldest running sequence is never preempted, and every request fits the arena alone, so all of them end.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from dovetail.engine.answers import Answer
from dovetail.engine.kv_cache import KVArena, PagePool, pages_for


class Scheduler:
    """The waiting and the running answers of one call to generate."""

    def __init__(
        self, answers: Iterable[Answer], arena: KVArena, *, max_running: int, max_prefill_tokens: int
    ) -> None:
        self.waiting = deque(answers)
        self.running: list[Answer] = []
        self.num_preempted = 0
        self._arena = arena
        self._pool = PagePool(arena.num_pages)
        self._max_running = max_running
        self._max_prefill_tokens = max_prefill_tokens

    def admit(self) -> list[Answer]:
        """Start as many waiting answers, in order, as pages, places and one prefill have room for."""
        admitted: list[Answer] = []
        num_tokens = 0
        while self.waiting and len(self.running) < self._max_running:
            answer = self.waiting[0]
            num_tokens += answer.num_tokens
            if admitted and num_tokens > self._max_prefill_tokens:
                break
            needed = pages_for(answer.num_tokens)
            if self.running and needed + self._num_growing() > self._pool.num_free:
                break
            self._pool.take(answer.pages, needed)
            self.running.append(self.waiting.popleft())
            admitted.append(answer)
        self._arena.clear([answer.pages[-1] for answer in admitted])
        return admitted

    def make_room(self) -> bool:
        """A page for every running answer's next token, preempting the youngest if need be.

        Returns whether any table changed.
        """
        num_preempted = self.num_preempted
        grown: list[Answer] = []
        for answer in list(self.running):
            missing = pages_for(answer.num_tokens) - len(answer.pages)
            while missing > self._pool.num_free and answer in self.running:
                self._preempt_youngest()
            if missing and answer in self.running:
                self._pool.take(answer.pages, missing)
                grown.append(answer)
        self._arena.clear([answer.pages[-1] for answer in grown if answer.pages])
        return bool(grown) or self.num_preempted > num_preempted

    def retire(self) -> bool:
        """Let finished answers go; True = there were some."""
        finished = [answer for answer in self.running if answer.finish_reason]
        if finished:
            self.running = [answer for answer in self.running if not answer.finish_reason]
            self._release(finished)
        return bool(finished)

    def _num_growing(self) -> int:
        """Running answers that may still need a page; each keeps one in reserve.

        Without the reserve an answer would be admitted only to be preempted at once, its prefill wasted.
        """
        return sum(len(answer.pages) < pages_for(answer.max_tokens) for answer in self.running)

    def _preempt_youngest(self) -> None:
        """Send the last admitted answer back to wait; its tokens will be prefilled again."""
        answer = self.running.pop()
        self._release([answer])
        self.waiting.appendleft(answer)
        self.num_preempted += 1

    def _release(self, answers: list[Answer]) -> None:
        self._arena.move(self._pool.give_back([answer.pages for answer in answers]))
