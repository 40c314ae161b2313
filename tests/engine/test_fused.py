"""The fused decode step computes what the modules compute, for every family, on the CPU's plain operations."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from dovetail.engine import Completion, HybridEngine, Sampling
from dovetail.engine.forward import DecodeLayout, PageMap
from dovetail.engine.fused import FusedStep, _probed_rows, fused_step
from dovetail.engine.kv_cache import KVArena
from dovetail.model.lora import adapter_disabled, add_lora
from tests.fakes import TINY, tiny_model

_SHAPE: dict[str, Any] = dict(
    vocab_size=258, eos_token_id=256, pad_token_id=257, bos_token_id=None, hidden_size=32, intermediate_size=64,
    num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
    initializer_range=0.2,
)  # fmt: skip
RELATIVES: dict[str, Callable[[], PretrainedConfig]] = {
    "granite": lambda: GraniteConfig(
        **_SHAPE, residual_multiplier=0.6, embedding_multiplier=3.0, attention_multiplier=0.2, logits_scaling=2.0
    ),
    "llama with biases, YaRN and a tied head": lambda: LlamaConfig(
        **_SHAPE, attention_bias=True, mlp_bias=True, tie_word_embeddings=True,
        rope_parameters={"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0,
                         "original_max_position_embeddings": 128},
    ),
    "gpt-neox, one branch after the other": lambda: GPTNeoXConfig(
        **_SHAPE, use_parallel_residual=False, rope_parameters={"rope_type": "default", "rope_theta": 10000.0,
                                                                "partial_rotary_factor": 0.5},
    ),
    "gpt2 with scores scaled by layer": lambda: GPT2Config(
        vocab_size=258, bos_token_id=None, eos_token_id=256, n_embd=32, n_layer=2, n_head=4, n_positions=512,
        initializer_range=0.2,
        scale_attn_by_inverse_layer_idx=True, activation_function="relu",
    ),
    "opt without biases or a last norm": lambda: OPTConfig(
        vocab_size=258, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
        word_embed_proj_dim=32, max_position_embeddings=512, init_std=0.2, enable_bias=False,
        _remove_final_layer_norm=True, activation_function="gelu",
    ),
    "phi3 that turns half of each head": lambda: Phi3Config(
        **_SHAPE, rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    ),
    "qwen2 with one window": lambda: Qwen2Config(
        **_SHAPE, use_sliding_window=True, sliding_window=5, max_window_layers=1
    ),
}  # fmt: skip


def model_of(name: str, dtype: torch.dtype = torch.float64) -> Any:
    if name in TINY:
        return tiny_model(name, dtype=dtype)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(RELATIVES[name]())
        for parameter in model.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
    return model.to(dtype).eval()


def on_the_cpu(arena: KVArena, tables: list[list[int]], lengths: list[int]) -> DecodeLayout:
    places = [divmod(length, 64) for length in lengths]
    pages_B = torch.tensor([table[page] for table, (page, _) in zip(tables, places, strict=True)])
    rows_HB = arena.rows_of(pages_B, torch.tensor([offset for _, offset in places]))
    return DecodeLayout(arena, PageMap(tables, pages_B.device), rows_HB, torch.tensor(lengths) + 1)


def step_of(engine: HybridEngine, num_pages: int = 8) -> tuple[FusedStep | None, str | None]:
    shape = engine.modules.kv_shape()
    assert shape is not None
    return fused_step(engine.modules, KVArena(shape, num_pages, torch.device("cpu")), on_the_cpu)


def decode_fused(engine: HybridEngine) -> list[int]:
    """Let the fused step decode for this engine, the modules read prompts; the list counts the steps by their rows."""
    step, why_not = step_of(engine)
    assert step is not None, why_not
    by_modules, rows = engine.modules.next_logits, []

    def next_logits(ids_T: Tensor, positions_T: Tensor, layout: Any, last_S: Tensor | None = None) -> Tensor:
        if last_S is not None:
            return by_modules(ids_T, positions_T, layout, last_S)
        rows.append(len(ids_T))
        return step.next_logits(ids_T, positions_T, layout)

    engine.modules.next_logits = next_logits  # type: ignore[method-assign]
    return rows


def run(engine: HybridEngine, lengths: tuple[int, ...] = (9, 1, 70, 64)) -> list[Completion]:
    rng = random.Random(1)
    prompts = [[rng.randrange(250) for _ in range(length)] for length in lengths]
    with engine.generating() as generate:
        return generate(prompts, Sampling(max_new_tokens=12, temperature=0.8), seeds=range(len(prompts)))


def expect_same(found: list[Completion], expected: list[Completion], tolerance: float) -> None:
    assert [one.token_ids for one in found] == [one.token_ids for one in expected]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(
            torch.tensor(one.logprobs), torch.tensor(other.logprobs), atol=tolerance, rtol=tolerance
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", [*TINY, *RELATIVES])
def test_every_family_decodes_as_its_modules(name: str, dtype: torch.dtype) -> None:
    model = model_of(name, dtype)
    expected = run(HybridEngine(model))
    engine = HybridEngine(model, max_running=3)  # the batch size changes under way
    rows = decode_fused(engine)
    expect_same(run(engine), expected, 1e-5 if dtype == torch.float64 else 1e-4)
    assert set(rows) >= {1, 3}


@pytest.mark.parametrize("name", ["opt", "gpt2", "gpt-neox", "phi3", "gemma3"])
def test_a_parameter_changed_in_place_is_what_the_next_step_reads(name: str) -> None:
    model = model_of(name)
    engine = HybridEngine(model)
    decode_fused(engine)
    before = run(engine)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    after = run(engine)
    expect_same(after, run(HybridEngine(model)), 1e-5)
    assert [one.token_ids for one in after] != [one.token_ids for one in before]


@pytest.mark.parametrize("name", ["opt", "gpt2", "gpt-neox", "qwen3", "phi3"])
def test_adapters_are_added_beside_the_base_and_can_be_switched_off(name: str) -> None:
    model = add_lora(model_of(name), rank=4, alpha=8, seed=0)
    generator = torch.Generator().manual_seed(0)
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    engine = HybridEngine(model)
    decode_fused(engine)
    adapted = run(engine)
    expect_same(adapted, run(HybridEngine(model)), 1e-5)
    with adapter_disabled(model):
        engine = HybridEngine(model)
        decode_fused(engine)
        base = run(engine)
        expect_same(base, run(HybridEngine(model)), 1e-5)
    assert [one.token_ids for one in adapted] != [one.token_ids for one in base]


def why_not(model: Any) -> str | None:
    step, reason = step_of(HybridEngine(model))
    assert (step is None) == (reason is not None)
    return reason


def test_what_is_not_known_is_left_to_the_modules_with_the_reason() -> None:
    other = AutoModelForCausalLM.from_config(Olmo2Config(**_SHAPE)).eval()
    assert why_not(other) == "Olmo2ForCausalLM is not among the families that it knows"
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    growing = AutoModelForCausalLM.from_config(LlamaConfig(**_SHAPE, rope_parameters=rope)).eval()
    assert "of the kind dynamic" in str(why_not(growing))
    swish = AutoModelForCausalLM.from_config(LlamaConfig(**_SHAPE, hidden_act="mish")).eval()
    assert "activation is" in str(why_not(swish))


def test_adapters_of_other_kinds_are_left_to_the_modules() -> None:
    several = add_lora(tiny_model(), rank=4, alpha=8, seed=0)
    several.add_adapter("second", several.peft_config["default"])
    several.base_model.set_adapter(["default", "second"])
    assert "other adapters than one of LoRA" in str(why_not(several))
    merged = add_lora(tiny_model(), rank=4, alpha=8, seed=0)
    merged.merge_adapter()
    assert "merged" in str(why_not(merged))


@pytest.mark.parametrize("name", ["opt", "llama", "gpt-neox"])
def test_modules_that_compute_something_else_than_their_parameters_say_are_found_out(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(name)
    assert why_not(model) is None
    decoder = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
    forward = decoder[0].forward
    monkeypatch.setattr(decoder[0], "forward", lambda *args, **kwargs: 1.02 * forward(*args, **kwargs))
    assert str(why_not(model)).startswith("the fused step's logits differ from the modules' by ")


def deep(kind: type[PretrainedConfig]) -> Any:
    """Return a model of 60 layers in bfloat16; rounding alone moves its logits by more than 5 %."""
    config = kind(**(_SHAPE | {"num_hidden_layers": 60, "hidden_size": 64}))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).to(torch.bfloat16).eval()


@pytest.mark.parametrize("kind", [Qwen2Config, LlamaConfig, Gemma2Config])
def test_rounding_that_adds_up_over_many_layers_is_no_fault(kind: type[PretrainedConfig]) -> None:
    assert why_not(deep(kind)) is None


@pytest.mark.parametrize("kind", [Qwen2Config, LlamaConfig, Qwen3Config])
def test_a_fault_is_found_beside_the_rounding_of_many_layers(
    kind: type[PretrainedConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = deep(kind)
    attention = model.model.layers[0].self_attn
    forward = attention.forward

    def stronger(*args: Any, **kwargs: Any) -> Any:
        mixed, *others = forward(*args, **kwargs)
        return (1.5 * mixed, *others)

    monkeypatch.setattr(attention, "forward", stronger)
    assert str(why_not(model)).startswith("the fused step's logits differ from the modules' by ")


def test_parameters_that_no_operation_here_can_read_are_left_to_the_modules() -> None:
    class Packed(torch.nn.Linear):
        """A layer that may store its weight in any way."""

    packed = tiny_model()
    packed.model.layers[1].mlp.down_proj = Packed(64, 32, bias=False)
    assert str(why_not(packed)) == "one of its layers is a Packed, not plain linear"
    mixed = tiny_model(dtype=torch.bfloat16)
    mixed.model.norm.float()
    mixed.lm_head.float()
    assert "differ in precision" in str(why_not(mixed))


@pytest.mark.parametrize(("num_pages", "lengths"), [(1, [3]), (3, [3, 70]), (9, [3, 70, 30, 0])])
def test_the_comparison_takes_what_pages_and_context_there_are(num_pages: int, lengths: list[int]) -> None:
    step, reason = step_of(HybridEngine(tiny_model("mistral")), num_pages)
    assert (step is None, reason) == (False, None)
    assert _probed_rows(num_pages, None)[0] == lengths
    assert _probed_rows(9, 20)[0] == [3, 0]


def test_numbers_that_are_none_prove_nothing() -> None:
    model = tiny_model()
    next(model.parameters()).data.fill_(torch.nan)
    assert str(why_not(model)).endswith("by nan%")
