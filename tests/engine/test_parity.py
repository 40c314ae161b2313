"""The parity gate lets right engines pass and names what is wrong in broken ones."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dovetail.engine import Completion, HybridEngine, probe
from dovetail.engine.parity import NEW_TOKENS, check_parity, check_training_parity
from dovetail.errors import ParityError
from dovetail.model.attention import ATTENTION_NAME, PackedLayout, packed_attention
from dovetail.model.scalar import scalar_model_from
from tests.fakes import PADDED, TINY, tiny_model

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def prompts_of(*lengths: int) -> list[list[int]]:
    rng = random.Random(1)
    return [[rng.randrange(250) for _ in range(length)] for length in lengths]


PROMPTS = prompts_of(10, 200, 40)


@pytest.fixture
def past_the_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe lets every engine pass, so that the gate alone judges."""
    monkeypatch.setattr(probe, "_fault", lambda *_: None)
    monkeypatch.setattr(probe, "is_probed", lambda _: True)


@pytest.fixture
def attend_wrongly(
    monkeypatch: pytest.MonkeyPatch, past_the_probe: None
) -> Callable[[Callable[..., Any]], None]:
    """Puts `wrong(module, key, value, layout, kwargs) -> (key, value)` before our registered attention."""

    def install(wrong: Callable[..., Any]) -> None:
        def attention(
            module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
        ) -> Any:
            key, value = wrong(module, key, value, kwargs)
            return packed_attention(module, query, key, value, mask, **kwargs)

        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, ATTENTION_NAME, attention)

    return install


def generates(kwargs: dict[str, Any]) -> bool:
    """Whether an attention call comes from the engine and not from the training forward."""
    return not isinstance(kwargs["layout"], PackedLayout)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", TINY)
def test_every_architecture_passes(name: str, dtype: torch.dtype) -> None:
    report = check_parity(HybridEngine(tiny_model(name, dtype=dtype)), PROMPTS)
    assert report.num_tokens == len(PROMPTS) * NEW_TOKENS
    assert 0 <= report.largest_gap < {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 0.2}[dtype]


@pytest.mark.filterwarnings("ignore:.*keeps its own attention")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PADDED)
def test_models_that_run_over_padded_batches_pass(name: str, dtype: torch.dtype) -> None:
    assert check_parity(HybridEngine(tiny_model(name, dtype=dtype)), PROMPTS).num_tokens


def test_a_model_that_was_loaded_with_attention_that_drops_its_soft_cap_is_judged_with_the_cap() -> None:
    model = tiny_model("gemma2")
    model.set_attn_implementation("sdpa")
    assert check_parity(HybridEngine(model), PROMPTS).largest_gap < 1e-4
    assert model.config._attn_implementation == "sdpa"


def test_the_answers_fit_into_a_short_context() -> None:
    model = tiny_model("opt")
    model.config.max_position_embeddings = NEW_TOKENS + 5
    assert check_parity(HybridEngine(model), prompts_of(100)).num_tokens == NEW_TOKENS


@pytest.mark.usefixtures("past_the_probe")
def test_adapters_are_part_of_what_is_compared() -> None:
    model = get_peft_model(tiny_model(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator)
    assert check_parity(HybridEngine(model), PROMPTS).largest_gap < 1e-3
    engine = HybridEngine(model)
    handle = model.base_model.model.register_forward_pre_hook(_with_doubled_positions, with_kwargs=True)
    with pytest.raises(ParityError, match=r"LlamaForCausalLM: generation .* is model\.layers\.0:"):
        check_parity(engine, PROMPTS)
    handle.remove()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_keys_stored_one_place_off_name_their_layer(attend_wrongly: Any, dtype: torch.dtype) -> None:
    def off_by_one(module: Any, key: Tensor, value: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        return (key.roll(1, dims=2) if generates(kwargs) and module.layer_idx == 1 else key), value

    attend_wrongly(off_by_one)
    with pytest.raises(ParityError, match=r"LlamaForCausalLM: generation .* is model\.layers\.1:"):
        check_parity(HybridEngine(tiny_model(dtype=dtype)), PROMPTS)


@pytest.mark.parametrize(("name", "layer"), [("mistral", 0), ("gemma3", 0), ("gemma2", 0)])
def test_a_forgotten_window_names_its_layer(attend_wrongly: Any, name: str, layer: int) -> None:
    def without_window(_: Any, key: Tensor, value: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        if generates(kwargs):
            kwargs["sliding_window"] = None
        return key, value

    attend_wrongly(without_window)
    with pytest.raises(ParityError, match=rf"generation .* is model\.layers\.{layer}:"):
        check_parity(HybridEngine(tiny_model(name)), PROMPTS)


def test_a_forgotten_soft_cap_names_its_layer(attend_wrongly: Any) -> None:
    def without_cap(module: Any, key: Tensor, value: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        if generates(kwargs) and module.layer_idx == 1:
            kwargs["softcap"] = None
        return key, value

    attend_wrongly(without_cap)
    with pytest.raises(ParityError, match=r"Gemma2ForCausalLM: generation .* is model\.layers\.1:"):
        check_parity(HybridEngine(tiny_model("gemma2")), PROMPTS)


def _with_doubled_positions(_: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    if "layout" in kwargs:  # the engine's calls alone: training calls the backbone
        kwargs["position_ids"] = kwargs["position_ids"] * 2
    return args, kwargs


@pytest.mark.parametrize(
    ("name", "where"), [("llama", r"model\.layers\.0"), ("gpt2", "the embedding"), ("opt", "the embedding")]
)
@pytest.mark.usefixtures("past_the_probe")
def test_wrong_positions_show_where_positions_enter(name: str, where: str) -> None:
    model = tiny_model(name)
    model.register_forward_pre_hook(_with_doubled_positions, with_kwargs=True)
    with pytest.raises(ParityError, match=f"generation .* is {where}:"):
        check_parity(HybridEngine(model), PROMPTS)


def test_a_wrong_training_forward_is_caught_as_well(attend_wrongly: Any) -> None:
    def wrong(module: Any, key: Tensor, value: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        return key, (value.roll(1, dims=2) if not generates(kwargs) and module.layer_idx == 1 else value)

    attend_wrongly(wrong)
    with pytest.raises(ParityError, match=r"the training forward and .* is model\.layers\.1:"):
        check_parity(HybridEngine(tiny_model()), PROMPTS)


@pytest.mark.usefixtures("past_the_probe")
def test_sequences_that_see_each_other_when_packed_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = PackedLayout.attend

    def one_sequence(self: PackedLayout, *args: Any, **kwargs: Any) -> Tensor:
        whole = PackedLayout(self.cu_seqlens_S1[[0, -1]], (sum(self.lengths),))
        return honest(whole, *args, **kwargs)

    monkeypatch.setattr(PackedLayout, "attend", one_sequence)
    with pytest.raises(ParityError, match=r"generation .* at sequences that share a batch"):
        check_parity(HybridEngine(tiny_model()), PROMPTS)


class _Altered(HybridEngine):
    """Reports other completions than it generated."""

    def __init__(self, model: Any, alter: Callable[[Completion], Completion]) -> None:
        super().__init__(model)
        self._alter = alter

    @contextmanager
    def generating(self) -> Iterator[Any]:
        with super().generating() as generate:
            yield lambda *args, **kwargs: [self._alter(found) for found in generate(*args, **kwargs)]


@pytest.mark.parametrize("off", [0.05, 0.005, float("nan")])
def test_wrong_logprobs_of_right_tokens_point_behind_the_layers(off: float) -> None:
    def alter(found: Completion) -> Completion:
        return replace(found, logprobs=tuple(logprob + off for logprob in found.logprobs))

    with pytest.raises(ParityError, match=r"No layer differs over prompt and answer .*look at what follows"):
        check_parity(_Altered(tiny_model(), alter), PROMPTS)


def test_the_error_says_which_token_and_what_to_do() -> None:
    engine = HybridEngine(tiny_model())
    with engine.generating() as generate:
        from dovetail.engine import Sampling

        (right,) = generate([PROMPTS[0]], Sampling(max_new_tokens=NEW_TOKENS, temperature=0.0), seeds=[0])
    other = (right.token_ids[0] + 1) % 250

    def alter(found: Completion) -> Completion:
        return replace(found, token_ids=(other, *found.token_ids[1:]))

    with pytest.raises(ParityError) as caught:
        check_parity(_Altered(engine.model, alter), PROMPTS, decode_text=lambda ids: f"<{len(ids)}>")
    assert f"token 0 of the answer to prompt 0 (10 tokens, ending in '<8>'). Token {other} ('<1>')" in str(
        caught.value
    )
    assert f"log-probability {right.logprobs[0]:.4f}" in str(caught.value)
    assert f"its own choice is token {right.token_ids[0]} ('<1>')" in str(caught.value)
    assert caught.value.hint is not None


@pytest.mark.parametrize("name", ["llama", "gemma2", "opt"])
@pytest.mark.parametrize("broken", [False, True])
def test_the_model_is_afterwards_as_before(name: str, broken: bool) -> None:
    model = tiny_model(name)
    model.train()
    next(model.children()).eval()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    attention, state = model.config._attn_implementation, torch.get_rng_state()
    handles = [module._forward_hooks.copy() for module in model.modules()]
    if broken:
        with pytest.raises(ParityError):
            check_parity(_Altered(model, lambda found: replace(found, logprobs=(0.0,) * NEW_TOKENS)), PROMPTS)
    else:
        check_parity(HybridEngine(model), PROMPTS)
    assert [module.training for module in model.modules()] == modes
    assert model.config._attn_implementation == attention
    assert [module._forward_hooks for module in model.modules()] == handles
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def scalar_model(name: str, dtype: torch.dtype = torch.float32) -> Any:
    return scalar_model_from(tiny_model(name, dtype=dtype), seed=0, pad_token_id=None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", TINY)
def test_the_training_forward_alone_passes_for_language_and_reward_models(
    name: str, dtype: torch.dtype
) -> None:
    for model in (tiny_model(name, dtype=dtype), scalar_model(name, dtype)):
        report = check_training_parity(model, prompts_of(30, 7, 200, 50))
        assert report.num_tokens == 24 + 7 + 120
        assert report.largest_error < {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 0.1}[dtype]


@pytest.mark.parametrize("make", [tiny_model, scalar_model])
def test_a_wrong_training_forward_is_named_without_generating(attend_wrongly: Any, make: Any) -> None:
    def wrong(module: Any, key: Tensor, value: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        return key, (value.roll(1, dims=2) if module.layer_idx == 1 else value)

    attend_wrongly(wrong)
    model = make("llama")
    model.train()
    with pytest.raises(ParityError, match=r"Llama.*: the training forward and .* is (model\.)?layers\.1:"):
        check_training_parity(model, PROMPTS)
    assert model.training
    assert model.config._attn_implementation == "sdpa"


def test_rows_that_see_each_other_when_packed_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = PackedLayout.attend

    def one_sequence(self: PackedLayout, *args: Any, **kwargs: Any) -> Tensor:
        whole = PackedLayout(self.cu_seqlens_S1[[0, -1]], (sum(self.lengths),))
        return honest(whole, *args, **kwargs)

    monkeypatch.setattr(PackedLayout, "attend", one_sequence)
    with pytest.raises(ParityError, match=r"at token \d+ of row [12], .* is model\.layers\.0:"):
        check_training_parity(tiny_model(), PROMPTS)


def wrong_beyond(length: int) -> Callable[..., tuple[Tensor, Tensor]]:
    """A fault that shows only in sequences longer than this, as a forgotten window does."""

    def wrong(_: Any, key: Tensor, value: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        lengths_T = getattr(kwargs["layout"], "lengths_T", None)
        if lengths_T is None:
            return key, value
        return key, torch.where((lengths_T > length)[:, None], value.flip(-1), value)

    return wrong


def test_the_gate_reads_as_far_as_the_run_will(attend_wrongly: Any) -> None:
    engine = HybridEngine(tiny_model())
    attend_wrongly(wrong_beyond(200))
    assert check_parity(engine, PROMPTS, reach=190).num_tokens
    with pytest.raises(ParityError, match="prompt 2"):
        check_parity(engine, PROMPTS, reach=300)
    assert (
        check_training_parity(engine.model, PROMPTS, longest=prompts_of(190)[0]).num_tokens
        == 10 + 60 + 40 + 190
    )
    with pytest.raises(ParityError, match="row 3"):
        check_training_parity(engine.model, PROMPTS, longest=prompts_of(300)[0])


@pytest.mark.parametrize("seed", range(6))
def test_experts_that_half_precision_chooses_otherwise_stop_no_run(seed: int) -> None:
    config = MixtralConfig(
        vocab_size=258, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=1, initializer_range=0.3, sliding_window=None,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = MixtralForCausalLM(config).to(torch.bfloat16).eval()
    assert check_parity(HybridEngine(model), PROMPTS).num_tokens
    assert check_training_parity(model, PROMPTS).num_tokens
