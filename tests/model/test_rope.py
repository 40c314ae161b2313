"""Rope frequencies that depend on the length read: every sequence has its own, whatever is read beside it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    LlamaConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
)

from dovetail.batches import pack
from dovetail.engine import HybridEngine, Sampling
from dovetail.model.copies import copy_of
from dovetail.model.forward import token_logprobs
from dovetail.model.probe import probe
from dovetail.model.rope import rope_limit

LIMIT = 24
SHAPE: dict[str, Any] = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, initializer_range=0.3, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    tie_word_embeddings=False,
)  # fmt: skip
LONGROPE = dict(
    rope_type="longrope", rope_theta=10000.0, short_factor=[1.0] * 4, long_factor=[4.0, 8.0, 16.0, 32.0],
    original_max_position_embeddings=LIMIT,
)  # fmt: skip
DYNAMIC = dict(rope_type="dynamic", rope_theta=10000.0, factor=8.0)
CONFIGS: dict[str, PreTrainedConfig] = {
    "longrope": Phi3Config(
        **SHAPE, max_position_embeddings=256, original_max_position_embeddings=LIMIT, rope_parameters=LONGROPE
    ),
    "longrope of another class": Qwen2Config(**SHAPE, max_position_embeddings=256, rope_parameters=LONGROPE),
    "dynamic, in attention of its own": FalconConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.3,
        alibi=False,
        max_position_embeddings=LIMIT,
        rope_parameters=DYNAMIC,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "dynamic": LlamaConfig(**SHAPE, max_position_embeddings=LIMIT, rope_parameters=DYNAMIC),
}


def model_with(rope: str) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[rope]), dtype=torch.float32).eval()


def rows_of(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 64, (length,), generator=generator).tolist() for length in lengths]


def alone(rope: str, ids: list[int]) -> torch.Tensor:
    """Logits [T, V] of transformers in a model that has read nothing before."""
    with torch.no_grad():
        return model_with(rope)(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


@pytest.mark.filterwarnings("ignore:.*one text at a time")
@pytest.mark.parametrize("lengths", [(10, 40), (40, 10), (LIMIT, 60, 33, LIMIT + 1)])
@pytest.mark.parametrize("rope", CONFIGS)
def test_packed_sequences_have_the_logprobs_that_each_has_alone(rope: str, lengths: tuple[int, ...]) -> None:
    rows = rows_of(*lengths)
    model = copy_of(model_with(rope))
    probe(model)
    for _ in range(2):  # what was read before must not matter either
        batch = pack(rows, [[False] + [True] * (len(row) - 1) for row in rows])
        with torch.no_grad():
            found = token_logprobs(model, batch).logprobs_T.split(lengths)
        for row, logprobs_T in zip(rows, found, strict=True):
            logits_TV = alone(rope, row)
            wanted = logits_TV[:-1].log_softmax(-1).gather(1, torch.tensor(row[1:])[:, None])[:, 0]
            torch.testing.assert_close(logprobs_T[1:], wanted, atol=1e-5, rtol=1e-4)
        rows, lengths = rows[::-1], lengths[::-1]


@pytest.mark.filterwarnings("ignore:.*reads every sequence again")
@pytest.mark.parametrize("options", [{}, {"max_prefill_tokens": 7}, {"max_running": 2}])
@pytest.mark.parametrize("rope", CONFIGS)
def test_answers_that_outgrow_the_limit_are_read_anew_and_do_not_depend_on_their_neighbours(
    rope: str, options: dict[str, int]
) -> None:
    engine = HybridEngine(model_with(rope), **options)  # type: ignore[arg-type]
    engine.context = 256
    prompts = rows_of(20, 50, 5, 20)
    expected = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(9):
            ids.append(int(alone(rope, ids)[-1].argmax()))
        expected.append(tuple(ids[len(prompt) :]))
    with engine.generating() as generate:
        greedy = Sampling(max_new_tokens=9, temperature=0.0)
        together = generate(prompts, greedy, seeds=range(4))
        lone = generate(prompts[:1], greedy, seeds=[0])
    assert [answer.token_ids for answer in together] == expected
    assert lone[0].token_ids == expected[0]


def test_the_limit_is_known_where_there_is_one() -> None:
    assert {rope_limit(model_with(rope)) for rope in CONFIGS} == {LIMIT}
    plain = LlamaConfig(**SHAPE)
    assert rope_limit(AutoModelForCausalLM.from_config(plain)) is None
