"""The slow way, for models that keep their own attention."""

from __future__ import annotations

import pytest
import torch

from dovetail.engine import HybridEngine, Sampling
from dovetail.engine import hybrid as hybrid_module
from tests.engine.test_hybrid import hf_greedy, prompts_of
from tests.fakes import PADDED, tiny_model


@pytest.mark.parametrize("name", PADDED)
def test_greedy_tokens_are_those_of_transformers_and_one_warning_says_why_it_is_slow(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hybrid_module, "_PADDED_BATCH", 3)
    model = tiny_model(name, dtype=torch.float64)
    prompts = prompts_of()
    expected = [hf_greedy(model, prompt, 12) for prompt in prompts]
    stop = expected[2][5]
    engine = HybridEngine(model)
    sampling = Sampling(max_new_tokens=12, temperature=0.0, stop_token_ids=(stop,))
    with pytest.warns(UserWarning, match="padded batches") as caught:
        for _ in range(2):
            with engine.generating() as generate:
                completions = generate(prompts, sampling, seeds=range(len(prompts)))
    assert len(caught) == 1
    assert type(model).__name__ in str(caught[0].message)
    for completion, free in zip(completions, expected, strict=True):
        end = free.index(stop) + 1 if stop in free else len(free)
        assert list(completion.token_ids) == free[:end]
        assert completion.finish_reason == ("stop" if stop in free else "length")


@pytest.mark.filterwarnings("ignore:.*padded batches")
def test_draws_are_those_of_the_fast_way(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, sampling = prompts_of(), Sampling(max_new_tokens=12, temperature=0.8, top_k=20)
    answers = []
    for reason in (None, "a test says so"):
        monkeypatch.setattr(hybrid_module, "why_not_packed", lambda _, reason=reason: reason)
        with HybridEngine(tiny_model(dtype=torch.float64)).generating() as generate:
            answers.append(generate(prompts, sampling, seeds=range(len(prompts))))
    fast, slow = answers
    assert [c.token_ids for c in fast] == [c.token_ids for c in slow]
    for one, other in zip(fast, slow, strict=True):
        torch.testing.assert_close(torch.tensor(one.logprobs), torch.tensor(other.logprobs))
