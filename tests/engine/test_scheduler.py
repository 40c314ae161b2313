"""Who runs, simulated without a model."""

from __future__ import annotations

import random

import torch

from dovetail.engine.kv_cache import KVArena, KVShape, pages_for
from dovetail.engine.sampling import Sampling
from dovetail.engine.scheduler import Answer, Chunk, Listener, Scheduler


def arena_of(num_pages: int) -> KVArena:
    return KVArena(KVShape(1, 1, 1, torch.float32), num_pages, torch.device("cpu"))


def answer_of(index: int, prompt_length: int, max_new_tokens: int) -> Answer:
    return Answer(index, (1,) * prompt_length, Sampling(max_new_tokens=max_new_tokens), 0, max_new_tokens)


def scheduler_of(
    answers: list[Answer], num_pages: int, *, running: int = 99, prefill: int = 9999
) -> Scheduler:
    return Scheduler(answers, arena_of(num_pages), max_running=running, max_prefill_tokens=prefill)


def simulate(scheduler: Scheduler, num_pages: int, max_running: int) -> list[list[Chunk]]:
    """Run to the end as the loop does, checking what must always hold; returns what each forward read."""
    read: list[list[Chunk]] = []
    while scheduler.waiting or scheduler.running:
        chunks = scheduler.admit()
        read += [chunks] if chunks else []
        for chunk in chunks:
            if chunk.is_last:
                chunk.answer.accept(0, 0.0, Listener())
        scheduler.retire()
        scheduler.make_room()
        ready = scheduler.ready()
        assert chunks or ready
        held = {page for answer in scheduler.running for page in answer.pages}
        assert held == set(range(len(held)))
        assert len(held) <= num_pages
        assert len(scheduler.running) <= max_running
        for answer in ready:
            assert len(answer.pages) == pages_for(answer.num_tokens)
            answer.num_cached += 1
            answer.accept(0, 0.0, Listener())
        scheduler.retire()
    return read


def test_every_answer_ends_whatever_the_lengths_and_however_few_the_pages() -> None:
    for num_pages, prefill in ((4, 9999), (5, 40), (9, 100)):
        rng = random.Random(0)
        answers = [answer_of(i, rng.randint(1, 130), rng.randint(1, 120)) for i in range(30)]
        scheduler = scheduler_of(answers, num_pages, running=8, prefill=prefill)
        read = simulate(scheduler, num_pages, 8)
        assert all(len(answer.token_ids) == answer.max_new_tokens for answer in answers)
        assert all(sum(chunk.num_tokens for chunk in chunks) <= prefill for chunks in read)
        if num_pages == 4:
            assert scheduler.num_preempted > 0


def test_admission_is_in_order_and_bounded_by_places() -> None:
    scheduler = scheduler_of([answer_of(i, 40, 5) for i in range(6)], 100, running=4)
    assert [(c.answer.index, c.start, c.end) for c in scheduler.admit()] == [(i, 0, 40) for i in range(4)]


def test_long_prompts_are_read_in_parts_beside_others() -> None:
    scheduler = scheduler_of([answer_of(0, 250, 5), answer_of(1, 30, 5)], 100, prefill=100)
    read = [[(c.answer.index, c.start, c.end, c.is_last) for c in scheduler.admit()] for _ in range(4)]
    assert read == [
        [(0, 0, 100, False)],
        [(0, 100, 200, False)],
        [(0, 200, 250, True), (1, 0, 30, True)],
        [],
    ]


def test_full_pages_of_one_prompt_are_shared_and_outlive_the_first_to_leave() -> None:
    answers = [answer_of(i, 130, 5) for i in range(3)]
    scheduler = scheduler_of(answers, 100)
    chunks = scheduler.admit()
    assert [(c.start, c.end) for c in chunks] == [(0, 130), (128, 130), (128, 130)]
    assert answers[0].pages[:2] == answers[1].pages[:2] == answers[2].pages[:2]
    assert len({answer.pages[2] for answer in answers}) == 3
    assert scheduler.num_shared_tokens == 2 * 128
    answers[0].finish_reason = "stop"
    scheduler.retire()
    assert answers[0].pages == []
    assert answers[1].pages[:2] == answers[2].pages[:2]
    assert len({*answers[1].pages, *answers[2].pages}) == 4


def test_a_prompt_that_ends_with_its_page_shares_all_but_that_page() -> None:
    scheduler = scheduler_of([answer_of(i, 128, 5) for i in range(2)], 100)
    assert [(c.start, c.end) for c in scheduler.admit()] == [(0, 128), (64, 128)]


def test_a_full_batch_waits_until_several_places_are_free() -> None:
    answers = [answer_of(i, 10, 5) for i in range(80)]
    scheduler = scheduler_of(answers, 1000, running=64)
    assert len(scheduler.admit()) == 64
    for count, admitted in ((3, 0), (1, 4)):
        for answer in scheduler.running[:count]:
            answer.finish_reason = "stop"
        scheduler.retire()
        assert len(scheduler.admit()) == admitted


def test_answers_that_need_no_more_pages_leave_all_others_to_newcomers() -> None:
    assert len(scheduler_of([answer_of(i, 20, 30) for i in range(8)], 8).admit()) == 8
    # These outgrow their page, so each keeps another in reserve.
    assert len(scheduler_of([answer_of(i, 20, 60) for i in range(8)], 8).admit()) == 4


def test_the_youngest_gives_way_and_comes_back_first() -> None:
    answers = [answer_of(i, 64, 10) for i in range(3)]
    scheduler = scheduler_of(answers, 3)
    # As if each of them had needed no second page when it was admitted.
    for answer in answers:
        answer.max_new_tokens = 0
    assert len(scheduler.admit()) == 3
    for answer in answers:
        answer.max_new_tokens = 10
        answer.accept(0, 0.0, Listener())
    assert scheduler.is_short_of_pages()
    assert [answer.index for answer in scheduler.make_room()] == [2, 1]
    assert [answer.index for answer in scheduler.running] == [0]
    assert [answer.index for answer in scheduler.waiting] == [1, 2]
    assert scheduler.waiting[0].token_ids == [0]
    assert scheduler.waiting[0].is_unread


def test_a_preempted_answer_decodes_only_after_a_forward_that_drew_its_next_token() -> None:
    for budget in range(1, 21):
        answer = answer_of(0, 10, 5)
        for _ in range(3):
            answer.accept(0, 0.0, Listener())
        scheduler = scheduler_of([answer], 1, prefill=budget)
        parts = []
        while not (parts and parts[-1].is_last):
            parts += scheduler.admit()
            assert scheduler.ready() == []
            assert all(part.num_tokens > 0 for part in parts)
        assert [part.start for part in parts] == [0, *(part.end for part in parts[:-1])]
        assert scheduler.admit() == []
        answer.accept(0, 0.0, Listener())
        assert scheduler.ready() == [answer]


def ended(answer: Answer, scheduler: Scheduler) -> Answer:
    """Let the only running answer draw its one token, and keep its pages."""
    (chunk,) = scheduler.admit()
    assert chunk.answer is answer
    answer.accept(7, 0.0, Listener())
    assert scheduler.retire() == [answer]
    return answer


def continued(before: Answer, reply: int, max_new_tokens: int = 1) -> Answer:
    following = answer_of(9, 0, max_new_tokens)
    following.prompt = (*before.all_ids, *[2] * reply)
    following.continues = before
    following.keeps_pages = True
    return following


def test_a_request_that_continues_another_reads_only_what_is_new() -> None:
    before = answer_of(0, 100, 1)
    before.keeps_pages = True
    scheduler = scheduler_of([before], 8)
    ended(before, scheduler)
    assert scheduler.load().num_pages == 2
    following = continued(before, 70)
    scheduler.waiting.append(following)
    (chunk,) = scheduler.admit()
    assert (chunk.start, chunk.end, chunk.is_last) == (100, 171, True)
    assert (following.pages, before.pages) == ([0, 1, 2], [])


def test_kept_pages_are_freed_when_others_need_them_or_nothing_will_follow() -> None:
    before, other = answer_of(0, 100, 1), answer_of(1, 190, 1)
    before.keeps_pages = True
    scheduler = scheduler_of([before], 3)
    ended(before, scheduler)
    scheduler.waiting.append(other)
    scheduler.admit()
    assert (len(other.pages), before.pages) == (3, [])
    other.accept(7, 0.0, Listener())
    scheduler.retire()
    following = continued(before, 20)
    scheduler.waiting.append(following)
    (chunk,) = scheduler.admit()
    assert (chunk.start, chunk.end) == (0, 121)
    following.accept(7, 0.0, Listener())
    scheduler.retire()
    assert scheduler.load().num_pages == 2
    following.keeps_pages = False
    scheduler.drop_ended()
    assert scheduler.load().num_pages == 0


def test_conversations_end_however_few_the_pages() -> None:
    for num_pages in (4, 6, 20):
        rng = random.Random(1)
        scheduler = scheduler_of([], num_pages, running=5)
        turns = {i: answer_of(i, rng.randint(1, 40), rng.randint(1, 20)) for i in range(12)}
        for turn in turns.values():
            turn.keeps_pages = True
        for _ in range(3):
            scheduler.waiting.extend(turns.values())
            simulate_with_kept(scheduler)
            assert all(turn.finish_reason for turn in turns.values())
            turns = {i: continued(turn, rng.randint(1, 30), rng.randint(1, 20)) for i, turn in turns.items()}


def simulate_with_kept(scheduler: Scheduler) -> None:
    """Run to the end as the loop does, where ended answers may hold pages too."""
    while scheduler.waiting or scheduler.running:
        for chunk in scheduler.admit():
            assert chunk.end <= len(chunk.answer.pages) * 64
            if chunk.is_last:
                chunk.answer.accept(0, 0.0, Listener())
        scheduler.retire()
        scheduler.make_room()
        for answer in scheduler.ready():
            answer.num_cached += 1
            answer.accept(0, 0.0, Listener())
        scheduler.retire()
