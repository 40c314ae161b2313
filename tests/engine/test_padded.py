"""The slow way, for models that keep their own attention."""

from __future__ import annotations

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM

from dovetail.engine import HybridEngine, Sampling
from dovetail.engine import hybrid as hybrid_module
from dovetail.engine import probe as probe_module
from dovetail.errors import GenerationError
from dovetail.parallel.world import TensorGroup
from tests.engine.test_hybrid import hf_greedy, prompts_of
from tests.fakes import PADDED, tiny_model


@pytest.mark.parametrize("name", PADDED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_greedy_tokens_are_those_of_transformers_and_one_warning_says_why_it_is_slow(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hybrid_module, "_PADDED_BATCH", 3)
    model = tiny_model(name, dtype=dtype)
    prompts = prompts_of((3, 64, 17, 64, 17, 1))
    expected = [hf_greedy(model, prompt, 12) for prompt in prompts]
    stop = expected[2][5]
    sampling = Sampling(max_new_tokens=12, temperature=0.0, stop_token_ids=(stop,))
    engine = HybridEngine(model)
    with pytest.warns(UserWarning, match=f"{type(model).__name__}.*padded batches"), engine.generating():
        pass
    with engine.generating() as generate:  # a second warning would be an error
        completions = generate(prompts, sampling, seeds=range(len(prompts)))
    for completion, free in zip(completions, expected, strict=True):
        end = free.index(stop) + 1 if stop in free else len(free)
        assert list(completion.token_ids) == free[:end]
        assert completion.finish_reason == ("stop" if stop in free else "length")


@pytest.mark.filterwarnings("ignore:.*padded batches")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_draws_are_those_of_the_fast_way(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, sampling = prompts_of(), Sampling(max_new_tokens=12, temperature=0.8, top_k=20)
    answers = []
    for reason in (None, "a test says so"):
        monkeypatch.setattr(probe_module, "why_not_packed", lambda _, reason=reason: reason)
        with HybridEngine(tiny_model(dtype=dtype)).generating() as generate:
            answers.append(generate(prompts, sampling, seeds=range(len(prompts))))
    fast, slow = answers
    assert [c.token_ids for c in fast] == [c.token_ids for c in slow]
    for one, other in zip(fast, slow, strict=True):
        torch.testing.assert_close(torch.tensor(one.logprobs), torch.tensor(other.logprobs))


def test_a_model_without_a_cache_of_keys_reads_every_sequence_again() -> None:
    config = MambaConfig(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=2,
        state_size=4,
        intermediate_size=32,
        initializer_range=0.5,
    )
    torch.manual_seed(0)
    model = MambaForCausalLM(config).eval()
    prompts = [[1, 2], [5, 6, 7, 8, 9]]
    expected = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(6):
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        expected.append(tuple(ids[len(prompt) :]))
    with (
        pytest.warns(UserWarning, match="reads every sequence again for each token"),
        HybridEngine(model).generating() as generate,
    ):
        found = generate(prompts, Sampling(max_new_tokens=6, temperature=0.0), seeds=[0, 1])
    assert [answer.token_ids for answer in found] == expected


def test_several_processes_cannot_share_a_padded_batch() -> None:
    engine = HybridEngine(tiny_model("bloom"), group=TensorGroup(0, 2))
    with (
        pytest.raises(GenerationError, match="padded batches, which 2 processes cannot share"),
        engine.generating(),
    ):
        pass
