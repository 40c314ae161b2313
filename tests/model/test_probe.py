"""A model reads batches in a way that gives each text what it has alone, or it is refused in one sentence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MptConfig,
    NemotronConfig,
    PreTrainedConfig,
    Qwen2MoeConfig,
)

from dovetail.batches import pack
from dovetail.engine import HybridEngine, Sampling
from dovetail.errors import ModelError
from dovetail.model.dropout import disable_dropout
from dovetail.model.forward import context_of, hidden_states, reading_of
from dovetail.model.linear_logprobs import head_of
from dovetail.model.load import load_causal_lm, load_scalar_model
from dovetail.model.probe import LONGEST_LIMIT, expect_no_noise, probe, short_limits
from tests.fakes import TINY, tiny_model

SHAPE: dict[str, Any] = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, initializer_range=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
EXPERTS: dict[str, Any] = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)


def qwen2_moe(window: int) -> Qwen2MoeConfig:
    """Its window is handed over in the mask alone."""
    return Qwen2MoeConfig(
        **SHAPE, **EXPERTS, shared_expert_intermediate_size=24, use_sliding_window=True, sliding_window=window,
        max_window_layers=2, max_position_embeddings=8192,
    )  # fmt: skip


def random_model(config: PreTrainedConfig) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


class LooksAtTheBatch(LlamaForCausalLM):
    """A model whose embeddings are centred over everything that is read at once."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.model.embed_tokens.register_forward_hook(
            lambda _, __, out: out - 0.5 * out.mean(dim=(0, 1)).detach()
        )


class CountsItsKeys(LlamaForCausalLM):
    """A model that gives other numbers once it reads from a cache, and none of it shows without one."""

    def forward(self, *args: Any, layout: Any = None, past_key_values: Any = None, **kwargs: Any) -> Any:
        out = super().forward(
            *args, past_key_values=past_key_values, **kwargs | ({"layout": layout} if layout else {})
        )
        if layout is not None:
            out.logits = out.logits.flip(-1)
        return out


def alone(model: Any, rows: list[list[int]]) -> Tensor:
    with torch.no_grad():
        return torch.cat(
            [
                model.base_model(input_ids=torch.tensor([row]), use_cache=False).last_hidden_state[0]
                for row in rows
            ]
        )


def rows_beyond(limit: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, 64, (n,), generator=generator).tolist() for n in (limit + 20, 7, limit + 3)]


@pytest.mark.filterwarnings("ignore:.*(padded|one text at a time)")
@pytest.mark.parametrize(
    ("make", "way"),
    [
        (lambda: random_model(NemotronConfig(**SHAPE)), "padded"),
        (lambda: random_model(qwen2_moe(24)), "padded"),
        (lambda: random_model(qwen2_moe(300)), "padded"),
    ],
    ids=["keyword arguments dropped", "window in the mask", "long window in the mask"],
)
def test_a_class_that_breaks_its_contract_takes_the_padded_way(make: Callable[[], Any], way: str) -> None:
    model = make()
    plain = make()
    limit = getattr(model.config, "sliding_window", None) or 24
    assert probe(model).way == way
    assert type(model).__name__ in str(reading_of(model).reason)
    rows = rows_beyond(limit)
    with torch.no_grad():
        found = hidden_states(model, pack(rows, [[False] * len(row) for row in rows]))
    torch.testing.assert_close(found, alone(plain, rows), atol=1e-4, rtol=1e-3)
    assert getattr(model.config, "sliding_window", None) == getattr(plain.config, "sliding_window", None)


@pytest.mark.filterwarnings("ignore:.*(padded|one text at a time)")
def test_a_model_that_looks_at_the_whole_batch_is_refused_or_read_alone() -> None:
    """Its own texts would be known by their ends: what it says of a text depends on what follows."""
    with pytest.raises(ModelError, match="LooksAtTheBatch is not supported: it reads ahead"):
        probe(LooksAtTheBatch(LlamaConfig(**SHAPE)).eval())


@pytest.mark.filterwarnings("ignore:.*falls back to padded")
def test_a_model_that_answers_over_pages_in_its_own_way_takes_the_padded_one() -> None:
    torch.manual_seed(0)
    model = CountsItsKeys(LlamaConfig(**SHAPE)).eval()
    with HybridEngine(model).generating() as generate:
        (found,) = generate([[5, 6, 7]], Sampling(max_new_tokens=4, temperature=0.0), seeds=[0])
    ids = [5, 6, 7]
    for _ in range(4):
        ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    assert list(found.token_ids) == ids[3:]


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_can_be_packed_is_packed(name: str, dtype: torch.dtype) -> None:
    assert probe(tiny_model(name, dtype=dtype)).way == "packed"


@pytest.mark.parametrize("seed", range(4))
def test_experts_that_rounding_chooses_are_no_reason_to_pad(seed: int) -> None:
    config = MixtralConfig(**SHAPE, num_local_experts=8, num_experts_per_tok=2, sliding_window=None)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    assert probe(model).way == "packed"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_reads_ahead_is_refused(dtype: torch.dtype) -> None:
    shape = {name: value for name, value in SHAPE.items() if name != "num_key_value_heads"}
    model = BertLMHeadModel(BertConfig(**shape)).to(dtype).eval()
    with pytest.raises(ModelError, match="BertLMHeadModel is not supported: it reads ahead"):
        probe(model)


def test_the_jitter_of_routers_is_switched_off() -> None:
    model = random_model(
        MixtralConfig(
            **SHAPE, num_local_experts=4, num_experts_per_tok=2, router_jitter_noise=0.3, sliding_window=None
        )
    )
    with pytest.raises(ModelError, match="in training it gives other numbers than in evaluation"):
        expect_no_noise(model)
    disable_dropout(model)
    expect_no_noise(model)
    model.train()
    row = [[5, 6, 7, 8, 9] * 5]
    torch.testing.assert_close(alone(model, row), alone(model.eval(), row))


def test_noise_of_any_other_name_is_refused() -> None:
    model = tiny_model("llama")

    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 0.2 * torch.randn_like(x) if self.training else x

    model.model.norm = nn.Sequential(model.model.norm, Noisy())
    with pytest.raises(ModelError, match="though dropout is off"):
        expect_no_noise(model)
    assert not model.training


def test_long_limits_are_short_for_a_while_in_config_and_modules() -> None:
    model = tiny_model("mistral")
    attention: Any = model.model.layers[0].self_attn
    model.config.sliding_window = attention.sliding_window = 4096
    with short_limits(model):
        assert (model.config.sliding_window, attention.sliding_window) == (LONGEST_LIMIT, LONGEST_LIMIT)
    assert (model.config.sliding_window, attention.sliding_window) == (4096, 4096)


@pytest.mark.filterwarnings("ignore:.*padded")
def test_every_loader_probes(tmp_path: Any) -> None:
    random_model(qwen2_moe(24)).save_pretrained(tmp_path / "m")
    loaded = load_causal_lm(str(tmp_path / "m"), dtype=torch.float32, device="cpu")
    scalar = load_scalar_model(str(tmp_path / "m"), dtype=torch.float32, device="cpu", seed=0, pad_token_id=0)
    assert (reading_of(loaded).way, reading_of(scalar).way) == ("padded", "padded")


def test_what_a_config_asks_of_routers_is_left_out() -> None:
    config = MixtralConfig(**SHAPE, num_local_experts=4, output_router_logits=True, sliding_window=None)
    model = random_model(config)
    engine = HybridEngine(model)
    with engine.generating() as generate:  # a warning of a slow way would be an error
        (found,) = generate([[5, 6, 7]], Sampling(max_new_tokens=3, temperature=0.0), seeds=[0])
    ids = [5, 6, 7]
    for _ in range(3):
        logits = model(input_ids=torch.tensor([ids]), use_cache=False, output_router_logits=False).logits
        ids.append(int(logits[0, -1].argmax()))
    assert list(found.token_ids) == ids[3:]


def test_a_scale_in_words_is_none() -> None:
    config = MptConfig(
        vocab_size=64, d_model=32, n_heads=4, n_layers=2, max_seq_len=64, logit_scale="inv_sqrt_d_model"
    )
    model = random_model(config)
    assert head_of(model).logit_scale == 1.0
    assert context_of(model) == 64
