"""Requests that join a running batch, against the same requests alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch

from dovetail.engine import HybridEngine, Sampling, hybrid
from dovetail.engine.probe import Way
from dovetail.engine.scheduler import Answer, Load
from dovetail.errors import GenerationError
from tests.engine.test_hybrid import hf_greedy, prompts_of, run
from tests.fakes import tiny_model


class Script:
    """A source that acts at given polls and ends when nothing runs and nothing is to come."""

    def __init__(self, **actions: Callable[[], Sequence[Answer]]) -> None:
        self._actions = {int(name.removeprefix("at_")): action for name, action in actions.items()}
        self.loads: list[Load] = []

    def poll(self, load: Load) -> Sequence[Answer] | None:
        action = self._actions.pop(len(self.loads), None)
        self.loads.append(load)
        if action is not None:
            return action()
        return None if load.is_idle and not self._actions else ()


def request(index: int, prompt: Sequence[int], sampling: Sampling) -> Answer:
    return Answer(index, tuple(prompt), sampling, seed=index, max_new_tokens=sampling.max_new_tokens)


def serve(source: Script, **options: int) -> None:
    model = tiny_model(dtype=torch.float64)
    with HybridEngine(model, **options).serving() as answer_all:  # type: ignore[arg-type]
        answer_all(source)


def test_requests_that_arrive_one_by_one_are_answered_as_if_alone() -> None:
    prompts, sampling = prompts_of(), Sampling(max_new_tokens=24, temperature=0.9)
    model = tiny_model(dtype=torch.float64)
    alone = [run(model, [p], sampling, seed=i)[0].token_ids for i, p in enumerate(prompts)]
    for options in ({}, {"max_cache_tokens": 5 * 64}, {"max_running": 2}, {"max_prefill_tokens": 50}):
        answers = [request(i, prompt, sampling) for i, prompt in enumerate(prompts)]
        arrivals = {f"at_{3 * i}": lambda answer=answer: [answer] for i, answer in enumerate(answers)}
        serve(Script(**arrivals), **options)
        assert [tuple(answer.token_ids) for answer in answers] == alone


def test_a_short_request_that_joins_ends_before_the_long_one_it_joined() -> None:
    long, short = (
        request(0, [5] * 20, Sampling(max_new_tokens=100)),
        request(1, [6] * 9, Sampling(max_new_tokens=5)),
    )
    when_short_ended: list[int] = []

    class Watching(Script):
        def poll(self, load: Load) -> Sequence[Answer] | None:
            if short.finish_reason and not when_short_ended:
                when_short_ended.append(len(long.token_ids))
            return super().poll(load)

    serve(Watching(at_0=lambda: [long], at_10=lambda: [short]))
    assert (long.finish_reason, short.finish_reason) == ("length", "length")
    assert 10 < when_short_ended[0] < 20


def test_a_cancelled_request_gives_its_pages_back_before_the_next_step() -> None:
    kept = request(0, [5] * 20, Sampling(max_new_tokens=40))
    gone = request(1, [6] * 130, Sampling(max_new_tokens=40))
    waiting = request(2, [7] * 130, Sampling(max_new_tokens=40))

    def cancel() -> list[Answer]:
        gone.finish_reason = waiting.finish_reason = "cancelled"
        return []

    source = Script(at_0=lambda: [kept, gone, waiting], at_5=cancel)
    serve(source, max_running=2)
    assert (source.loads[5].num_running, source.loads[5].num_waiting, source.loads[5].num_pages) == (2, 1, 4)
    assert (source.loads[6].num_running, source.loads[6].num_waiting, source.loads[6].num_pages) == (1, 0, 1)
    assert (gone.pages, waiting.token_ids) == ([], [])
    assert len(gone.token_ids) < 40 == len(kept.token_ids)
    assert source.loads[-1] == Load(0, 0, 0)


def test_a_long_prompt_cancelled_while_it_is_read_is_read_no_further() -> None:
    gone = request(0, [6] * 400, Sampling(max_new_tokens=4))

    def cancel() -> list[Answer]:
        gone.finish_reason = "cancelled"
        return []

    source = Script(at_0=lambda: [gone], at_2=cancel)
    serve(source, max_prefill_tokens=50)
    assert len(source.loads) == 4
    assert gone.token_ids == []


def test_what_does_not_fit_is_refused_before_it_is_handed_over() -> None:
    with HybridEngine(tiny_model(), max_cache_tokens=128).serving() as answer_all:
        assert answer_all.max_tokens == 128
        answer_all.expect_usable(request(0, [5] * 100, Sampling(max_new_tokens=28)), None)
        with pytest.raises(GenerationError, match=r"may take 129 tokens.*room for 128") as caught:
            answer_all.expect_usable(request(0, [5] * 100, Sampling(max_new_tokens=29)), None)
        assert caught.value.hint == "ask for at most 28 new tokens"


def test_the_weights_are_there_within_the_block_and_nothing_of_it_stays() -> None:
    seen: list[str] = []

    @contextmanager
    def weights() -> Iterator[None]:
        seen.append("entered")
        try:
            yield
        finally:
            seen.append("left")

    engine = HybridEngine(tiny_model(), weights=weights)
    answer = request(0, [5] * 20, Sampling(max_new_tokens=3))
    with engine.serving() as answer_all:
        answer_all(Script(at_0=lambda: [answer]))
        assert (seen, answer.finish_reason) == (["entered"], "length")
        with pytest.raises(AssertionError, match="already"), engine.generating():
            pass
    assert seen == ["entered", "left"]
    with pytest.raises(AssertionError):
        answer_all(Script(at_0=lambda: []))  # its cache is freed
    with engine.generating() as generate:
        assert len(generate([[5]], Sampling(max_new_tokens=2), seeds=[0])[0].token_ids) == 2


@pytest.mark.filterwarnings("ignore:.*(falls back|padded|reads every)")
@pytest.mark.parametrize("way", ["padded", "equal", "reread"])
def test_models_that_take_a_slow_way_are_served_one_batch_at_a_time(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hybrid, "find_way", lambda *_: Way(None, way, "a test says so"))  # type: ignore[arg-type]
    model, greedy = tiny_model("bloom"), Sampling(max_new_tokens=6, temperature=0.0)
    first, second, late = (request(i, prompt, greedy) for i, prompt in enumerate(([5, 6, 7], [9], [1, 2, 3])))
    cancelled = request(3, [4], greedy)

    def cancel() -> list[Answer]:
        cancelled.finish_reason = "cancelled"
        return []

    script = Script(at_0=lambda: [first, second, cancelled], at_1=lambda: [late], at_3=cancel)
    with HybridEngine(model).serving() as serve:
        serve(script)
    for answer in (first, second, late):
        assert answer.token_ids == hf_greedy(model, list(answer.prompt), 6)
    assert len(cancelled.token_ids) < 6


class Conversations:
    """A source of conversations: each ended request is continued by one with a few tokens more, two times."""

    def __init__(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> None:
        self.sampling = sampling
        self.turns = [[request(i, prompt, sampling)] for i, prompt in enumerate(prompts)]
        self.is_begun = False

    def poll(self, load: Load) -> Sequence[Answer] | None:
        arrived = [] if self.is_begun else [turns[0] for turns in self.turns]
        self.is_begun = True
        for turn in arrived:
            turn.keeps_pages = True
        for i, turns in enumerate(self.turns):
            if turns[-1].finish_reason and len(turns) < 3:
                following = request(i, [*turns[-1].all_ids, 9, 8, 7, i + 3], self.sampling)
                following.continues, following.keeps_pages = turns[-1], len(turns) < 2
                turns.append(following)
                arrived.append(following)
        return arrived if arrived or not load.is_idle else None


@pytest.mark.parametrize(
    "options",
    [{}, {"max_cache_tokens": 5 * 64}, {"max_running": 2}, {"max_running": 1}, {"max_prefill_tokens": 50}],
)
def test_conversations_go_on_as_if_all_were_read_again(options: dict[str, int]) -> None:
    sampling = Sampling(max_new_tokens=24, temperature=0.9)
    source = Conversations(prompts_of(), sampling)
    serve(source, **options)  # type: ignore[arg-type]
    model = tiny_model(dtype=torch.float64)
    for i, turns in enumerate(source.turns):
        assert len(turns) == 3
        for turn in turns:
            (alone,) = run(model, [turn.prompt], sampling, seed=i)
            assert tuple(turn.token_ids) == alone.token_ids
            torch.testing.assert_close(
                torch.tensor(turn.logprobs), torch.tensor(alone.logprobs), atol=1e-6, rtol=0
            )
