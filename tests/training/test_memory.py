import gc
import weakref

import pytest
import torch
from torch import Tensor

from dovetail.errors import TrainingStopped
from dovetail.training.step import TokenBudget, is_out_of_memory, retry_on_out_of_memory


def fits_up_to(limit: int, budget: TokenBudget, tried: list[int]) -> str:
    tried.append(budget.tokens)
    if budget.tokens > limit:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    return "done"


def test_the_budget_is_halved_until_the_work_fits_and_stays_so(capsys: pytest.CaptureFixture[str]) -> None:
    budget, tried, cleaned = TokenBudget(8192), [], []
    result = retry_on_out_of_memory(
        lambda: fits_up_to(3000, budget, tried), budget, clean_up=lambda: cleaned.append(True)
    )
    assert result == "done"
    assert tried == [8192, 4096, 2048]
    assert budget.tokens == 2048
    assert len(cleaned) == 2
    assert "halved from 8192 to 4096 tokens" in capsys.readouterr().err


def test_halving_starts_from_what_was_used() -> None:
    budget, tried = TokenBudget(8192), []
    retry_on_out_of_memory(lambda: fits_up_to(300, budget, tried), budget, unit_tokens=lambda: [100] * 10)
    assert tried == [8192, 500, 250]


def test_one_sequence_that_does_not_fit_stops_the_run_at_once() -> None:
    budget, tried = TokenBudget(8192), []
    with pytest.raises(TrainingStopped, match="one sequence of 700 tokens") as caught:
        retry_on_out_of_memory(lambda: fits_up_to(10, budget, tried), budget, unit_tokens=lambda: [700, 300])
    assert tried == [8192, 500]
    assert "activation_checkpointing" in str(caught.value.hint)


def test_without_sizes_the_retries_end_as_well() -> None:
    budget, tried = TokenBudget(5), []
    with pytest.raises(TrainingStopped):
        retry_on_out_of_memory(lambda: fits_up_to(0, budget, tried), budget)
    assert tried == [5, 2, 1]


def test_other_errors_pass_through() -> None:
    def fail() -> None:
        raise RuntimeError("size mismatch")

    with pytest.raises(RuntimeError, match="size mismatch"):
        retry_on_out_of_memory(fail, TokenBudget(8))


def test_what_a_failed_attempt_held_is_free_before_the_next() -> None:
    held: list[weakref.ref[Tensor]] = []
    budget = TokenBudget(2)

    def attempt() -> bool:
        if held:
            return held[0]() is None
        activations = torch.zeros(4)
        held.append(weakref.ref(activations))
        raise torch.OutOfMemoryError("out of memory")

    gc.disable()
    try:
        assert retry_on_out_of_memory(attempt, budget)
    finally:
        gc.enable()


def test_the_words_of_every_allocator_are_known() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(10**15)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("expected scalar type Float"))
    assert not is_out_of_memory(ValueError("out of memory"))


def test_an_empty_budget_is_refused() -> None:
    with pytest.raises(ValueError, match="0 tokens"):
        TokenBudget(0)


def test_a_budget_that_may_not_shrink_ends_the_run_and_says_with_what_to_start_again() -> None:
    budget = TokenBudget(100, may_shrink=False)

    def attempt() -> None:
        raise MemoryError

    with pytest.raises(TrainingStopped, match="100 tokens does not fit") as caught:
        retry_on_out_of_memory(attempt, budget, unit_tokens=lambda: [10] * 20)
    assert "micro_batch_tokens=50" in str(caught.value.hint)
    assert budget.tokens == 100


def test_a_budget_that_was_halved_stays_so_when_a_run_goes_on_unless_another_is_asked_for() -> None:
    halved = TokenBudget(100)
    halved.tokens = 25
    for asked, tokens in ((100, 25), (60, 60), (200, 200)):
        budget = TokenBudget(asked)
        budget.load_state_dict(halved.state_dict())
        assert budget.tokens == tokens
