"""Adapters: they start as nothing, learn alone, can be switched off, and merge."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Mamba2Config,
    MambaConfig,
    OlmoeConfig,
    ZambaConfig,
)

from dovetail.batches import pack
from dovetail.errors import ModelError
from dovetail.model.forward import hidden_states, last_scores, token_logprobs
from dovetail.model.lora import adapter_disabled, add_lora, merged_copy
from dovetail.model.scalar import scalar_model_from
from tests.fakes import TINY, tiny_model
from tests.tolerance import assert_near

BATCH = pack([[1, 2, 3, 4], [5, 6]], [[True] * 4, [True] * 2])


def with_lora(model, **changes):
    return add_lora(model, **{"rank": 2, "alpha": 4.0, "seed": 7, **changes})


def stir(model):
    """Give the adapters an effect: as made, their second factor is zero."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(
                parameter.dtype
            )
    return model


@pytest.mark.parametrize("name", TINY)
def test_an_adapter_starts_as_nothing_and_is_gone_when_switched_off(name):
    before = token_logprobs(tiny_model(name), BATCH).logprobs_T
    model = with_lora(tiny_model(name))
    assert_near(token_logprobs(model, BATCH).logprobs_T, before)
    stir(model)
    assert not torch.allclose(token_logprobs(model, BATCH).logprobs_T, before)
    with adapter_disabled(model):
        assert_near(token_logprobs(model, BATCH).logprobs_T, before)


@pytest.mark.parametrize("name", TINY)
def test_only_adapters_learn_and_their_gradient_is_that_of_the_merged_weight(name):
    model = stir(with_lora(tiny_model(name, dtype=torch.float64)))
    token_logprobs(model, BATCH).logprobs_T.sum().backward()
    learned = {key for key, parameter in model.named_parameters() if parameter.grad is not None}
    assert learned
    assert all("lora_" in key for key in learned)
    assert learned == {key for key, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("name", TINY)
def test_a_merged_copy_is_a_plain_model_that_computes_the_same(name):
    model = stir(with_lora(tiny_model(name, dtype=torch.float64)))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    merged = merged_copy(model)
    assert type(merged) is type(tiny_model(name))
    assert not any("lora" in key for key in merged.state_dict())
    dtype = torch.float32 if name.startswith("gemma") else torch.float64  # what their norms compute in
    assert_near(hidden_states(merged, BATCH), hidden_states(model, BATCH), dtype=dtype)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_merge_may_be_wider_than_the_weights():
    model = stir(with_lora(tiny_model(dtype=torch.bfloat16)))
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    exact = layer.base_layer.weight.double() + 2.0 * (
        layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
    )
    merged = merged_copy(model, dtype=torch.float32)
    assert_near(merged.model.layers[0].mlp.up_proj.weight, exact)


def test_adapters_have_the_precision_of_the_model():
    model = with_lora(tiny_model(dtype=torch.bfloat16))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_adapters_are_drawn_from_the_seed_and_nothing_else():
    state = torch.random.get_rng_state()
    one, same, other = (with_lora(tiny_model(), seed=seed).state_dict() for seed in (7, 7, 8))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(value, same[key]) for key, value in one.items())
    assert any(not torch.equal(value, other[key]) for key, value in one.items())


def test_a_scalar_model_trains_its_head_beside_the_adapters():
    scalar = scalar_model_from(tiny_model("opt-post-norm"), seed=0, pad_token_id=257)
    before = last_scores(scalar, BATCH).detach()
    model = with_lora(scalar)
    assert_near(last_scores(model, BATCH), before)
    last_scores(model, BATCH).sum().backward()
    learned = [key for key, parameter in model.named_parameters() if parameter.grad is not None]
    assert any("score" in key for key in learned)
    assert all("score" in key or "lora_" in key for key in learned)
    stir(model)
    with torch.no_grad():
        model.get_base_model().score.modules_to_save["default"].weight.mul_(2)
    assert_near(last_scores(merged_copy(model), BATCH), last_scores(model, BATCH))
    with adapter_disabled(model):
        assert_near(last_scores(model, BATCH), before)


def test_the_head_is_no_target_of_all_linear():
    model = with_lora(tiny_model("gpt-neox"))
    assert not any(
        "lora" in name for name, _ in model.get_base_model().get_output_embeddings().named_parameters()
    )


def test_named_targets_are_the_only_ones():
    model = with_lora(tiny_model(), target_modules=("q_proj", "v_proj"))
    adapted = {name.split(".")[-4] for name, _ in model.named_parameters() if "lora_A" in name}
    assert adapted == {"q_proj", "v_proj"}


def test_a_target_that_is_not_there_lists_those_that_are():
    with pytest.raises(ModelError, match="no linear layer named query") as caught:
        with_lora(tiny_model(), target_modules=("q_proj", "query"))
    assert "down_proj" in caught.value.hint


def test_switching_off_restores_what_learns_even_after_an_error():
    model = with_lora(tiny_model())
    model.requires_grad_(False)

    def fail():
        with adapter_disabled(model):
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert not any(parameter.requires_grad for parameter in model.parameters())
    stir(model)
    with adapter_disabled(model):
        off = token_logprobs(model, BATCH).logprobs_T
    assert not torch.allclose(token_logprobs(model, BATCH).logprobs_T, off)


def test_a_plain_model_has_nothing_to_switch_off():
    with pytest.raises(ModelError, match="no adapter"), adapter_disabled(tiny_model()):
        pass


@pytest.mark.parametrize("name", TINY)
def test_activation_checkpointing_reaches_adapters_of_a_frozen_model(name):
    plain, saving = (stir(with_lora(tiny_model(name, dtype=torch.float64))) for _ in range(2))
    token_logprobs(plain, BATCH).logprobs_T.sum().backward()
    saving.gradient_checkpointing_enable({"use_reentrant": False})
    from dovetail.model.dropout import disable_dropout

    disable_dropout(saving)
    saving.train()
    token_logprobs(saving, BATCH).logprobs_T.sum().backward()
    for (key, one), other in zip(plain.named_parameters(), saving.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), key
        if one.grad is not None:
            assert_near(other.grad, one.grad)


SIZES = {
    "vocab_size": 258,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "initializer_range": 0.2,
    "pad_token_id": 257,
    "eos_token_id": 256,
    "bos_token_id": None,
}


def made(config):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()


def zamba():
    """Two hybrid layers of one and the same transformer."""
    model = made(
        ZambaConfig(
            **SIZES,
            mamba_d_state=4,
            n_mamba_heads=2,
            layers_block_type=["hybrid", "mamba", "hybrid"],
            use_mamba_kernels=False,
        )
    )
    model.tie_weights()
    return model


def tied_llama():
    """A llama whose layers share one projection, as no config says."""
    model = tiny_model()
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    model.model.layers[1].self_attn.q_proj.weight = model.model.layers[0].self_attn.q_proj.weight
    return model


def logits(model, ids=(1, 2, 3, 4, 5)):
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits


@pytest.mark.parametrize("make", [zamba, tied_llama])
def test_layers_that_share_a_weight_share_its_adapter_and_merge_once(make):
    model = stir(with_lora(make()))
    adapters: dict[int, set[int]] = {}
    for module in model.modules():
        if hasattr(module, "base_layer"):
            adapters.setdefault(id(module.base_layer.weight), set()).add(id(module.lora_B["default"].weight))
    assert all(len(ids) == 1 for ids in adapters.values())
    assert len(adapters) < sum(hasattr(module, "base_layer") for module in model.modules())
    assert_near(logits(merged_copy(model)), logits(model))


def test_two_adapters_on_one_weight_are_not_merged():
    settings = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["up_proj"])
    theirs = stir(get_peft_model(tied_llama(), settings))
    with pytest.raises(
        ModelError, match=r"layers\.0\.mlp\.up_proj and .*layers\.1\.mlp\.up_proj share one weight"
    ):
        merged_copy(theirs)


class Router(nn.Linear):
    """Not what a linear layer gives."""

    def forward(self, x):
        return super().forward(x).softmax(-1), None


def adapted_names(model):
    names = (
        name.removeprefix("base_model.model.") for name, _ in model.named_parameters() if "lora_A" in name
    )
    return {name.partition(".lora_A")[0] for name in names}


def test_all_linear_means_plain_linear_layers_by_their_full_names():
    model = tiny_model()
    layer = model.model.layers[0]
    layer.router = Router(32, 4)
    layer.extra = nn.ModuleList([nn.Linear(32, 32), nn.Linear(32, 32)])
    adapted = adapted_names(with_lora(model))
    assert {"model.layers.0.extra.0", "model.layers.0.extra.1"} <= adapted
    assert not any("router" in name for name in adapted)
    # a leaf called 0 is not every module called 0
    assert "model.layers.0" not in adapted
    assert adapted_names(with_lora(tiny_model(), target_modules=("layers.1.mlp.up_proj",))) == {
        "model.layers.1.mlp.up_proj"
    }


def test_a_module_in_two_places_gets_no_adapter_in_one_of_them():
    model = tiny_model()
    model.model.layers[1].mlp.up_proj = model.model.layers[0].mlp.up_proj
    adapted = stir(with_lora(model))
    assert not any("up_proj" in name for name in adapted_names(adapted))
    assert_near(logits(merged_copy(adapted)), logits(adapted))
    with pytest.raises(ModelError, match="no linear layer named up_proj"):
        with_lora(model, target_modules=("up_proj",))


@pytest.mark.parametrize("config_class", [MambaConfig, Mamba2Config])
def test_layers_whose_weights_are_read_past_the_adapter_get_none(config_class):
    sizes = {"vocab_size": 258, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
    heads = {"num_heads": 4, "head_dim": 16, "n_groups": 1} if config_class is Mamba2Config else {}
    model = made(config_class(**sizes, **heads))
    with pytest.raises(ModelError, match="no linear layer named out_proj"):
        with_lora(model, target_modules=("out_proj",))
    adapted = stir(with_lora(model))
    assert {name.rpartition(".")[2] for name in adapted_names(adapted)} == {"in_proj"}
    assert_near(logits(merged_copy(adapted)), logits(adapted))


def test_the_tower_of_another_input_gets_no_adapter():
    text = {**SIZES, "head_dim": 8}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(text_config=text, vision_config={**vision, "image_size": 28, "patch_size": 14})
    names = adapted_names(with_lora(made(config)))
    assert names
    assert all("language_model" in name for name in names)


def test_the_share_of_the_weights_that_adapters_reach_is_said(capsys):
    with_lora(tiny_model())
    assert (
        "LoRA: adapters on 14 layers, which hold 99% of the weights beside the embeddings"
        in capsys.readouterr().err
    )
    sizes = {**SIZES, "num_experts": 8, "num_experts_per_tok": 2}
    model = with_lora(made(OlmoeConfig(**sizes)))
    fused = sum(p.numel() for name, p in model.named_parameters() if "experts" in name)
    plain = sum(p.numel() for name, p in model.named_parameters() if name.endswith("base_layer.weight"))
    norms = sum(p.numel() for name, p in model.named_parameters() if "norm" in name or "gate.weight" in name)
    said = capsys.readouterr().err
    assert f"warning: LoRA: adapters on 12 layers, which hold {plain / (fused + plain + norms):.0%}" in said
    assert "experts fused into one tensor" in said


def test_what_peft_refuses_is_told_in_its_words(monkeypatch):
    def refuses(*_, **__):
        raise ValueError("Target module Odd() is not supported.\nand more")

    monkeypatch.setattr("dovetail.model.lora.get_peft_model", refuses)
    with pytest.raises(
        ModelError, match=r"LlamaForCausalLM cannot have these adapters: Target module Odd\(\) is not"
    ):
        with_lora(tiny_model())
