"""Who runs, simulated without a model."""

from __future__ import annotations

import random

import torch

from dovetail.engine.answers import Answer, Listener
from dovetail.engine.kv_cache import KVArena, KVShape, pages_for
from dovetail.engine.sampling import Sampling
from dovetail.engine.scheduler import Scheduler


def arena_of(num_pages: int) -> KVArena:
    return KVArena(KVShape(1, 1, 1, torch.float32), num_pages, torch.device("cpu"))


def answer_of(index: int, prompt_length: int, max_new_tokens: int) -> Answer:
    return Answer(index, (1,) * prompt_length, Sampling(max_new_tokens=max_new_tokens), 0, max_new_tokens)


def scheduler_of(
    answers: list[Answer], num_pages: int, *, running: int = 99, prefill: int = 9999
) -> Scheduler:
    return Scheduler(answers, arena_of(num_pages), max_running=running, max_prefill_tokens=prefill)


def test_every_answer_ends_whatever_the_lengths_and_however_few_the_pages() -> None:
    rng = random.Random(0)
    for num_pages in (4, 5, 9):
        answers = [answer_of(i, rng.randint(1, 130), rng.randint(1, 120)) for i in range(30)]
        scheduler = scheduler_of(answers, num_pages, running=8)
        finished: list[Answer] = []
        while scheduler.waiting or scheduler.running:
            admitted = scheduler.admit()
            for answer in admitted:
                answer.accept(0, 0.0, Listener())
            scheduler.retire()
            scheduler.make_room()
            held = [page for answer in scheduler.running for page in answer.pages]
            assert sorted(held) == list(range(len(held)))
            assert len(held) <= num_pages
            assert len(scheduler.running) <= 8
            for answer in scheduler.running:
                assert len(answer.pages) == pages_for(answer.num_tokens)
                answer.accept(0, 0.0, Listener())
            finished += [answer for answer in scheduler.running if answer.finish_reason]
            scheduler.retire()
        assert all(len(answer.token_ids) == answer.max_new_tokens for answer in answers)
        if num_pages == 4:
            assert scheduler.num_preempted > 0


def test_admission_is_in_order_and_bounded_by_places_and_prefill_tokens() -> None:
    answers = [answer_of(i, 40, 5) for i in range(6)]
    assert [a.index for a in scheduler_of(answers, 100, running=4).admit()] == [0, 1, 2, 3]
    answers = [answer_of(i, 40, 5) for i in range(6)]
    scheduler = scheduler_of(answers, 100, prefill=100)
    assert [[a.index for a in scheduler.admit()] for _ in range(4)] == [[0, 1], [2, 3], [4, 5], []]


def test_a_prompt_above_the_prefill_bound_is_read_alone() -> None:
    answers = [answer_of(0, 500, 5), answer_of(1, 10, 5)]
    scheduler = scheduler_of(answers, 100, prefill=100)
    assert [len(scheduler.admit()) for _ in range(2)] == [1, 1]


def test_answers_that_need_no_more_pages_leave_all_others_to_newcomers() -> None:
    assert len(scheduler_of([answer_of(i, 20, 30) for i in range(8)], 8).admit()) == 8
    # These outgrow their page, so each keeps another in reserve.
    assert len(scheduler_of([answer_of(i, 20, 60) for i in range(8)], 8).admit()) == 4


def test_the_youngest_gives_way_and_comes_back_first() -> None:
    answers = [answer_of(i, 64, 10) for i in range(3)]
    scheduler = scheduler_of(answers, 4)
    scheduler.running = list(scheduler.waiting)
    scheduler.waiting.clear()
    for answer in scheduler.running:
        scheduler._pool.take(answer.pages, 1)
        answer.accept(0, 0.0, Listener())
    scheduler.make_room()
    assert [answer.index for answer in scheduler.running] == [0, 1]
    assert [answer.index for answer in scheduler.waiting] == [2]
    assert scheduler.waiting[0].token_ids == [0]
