"""Quantised checkpoints become plain models, and stay plain when saved."""

import json
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig, MixtralConfig

from dovetail.errors import ModelError
from dovetail.model.load import load_causal_lm, load_scalar_model
from dovetail.model.save import save_model
from tests.fakes import byte_tokenizer

IDS = torch.tensor([[1, 2, 3, 4, 5]])
SIZES = {
    "vocab_size": 258,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "initializer_range": 0.2,
    "eos_token_id": 256,
    "pad_token_id": 257,
    "bos_token_id": None,
}
FP8 = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [16, 16],
}


def plain_checkpoint(folder: Path, kind: str) -> dict[str, Tensor]:
    """A tiny model in the format of the hub; returns its weights."""
    configs = {
        "llama": lambda: LlamaConfig(**SIZES, tie_word_embeddings=False),
        "mixtral": lambda: MixtralConfig(**SIZES, num_local_experts=2, tie_word_embeddings=False),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(configs[kind]()).save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def quantise(folder: Path, settings: dict[str, object] | None, of_block: Callable[[Tensor], Tensor]) -> None:
    """Make the linear layers float8 in blocks of 16 x 16, or of 1 x 16 for scales that are bytes.

    of_block: the largest value of each block -> its scale as it stands in the file.
    """
    weights = load_file(folder / "model.safetensors")
    exact = {}
    for name, weight in list(weights.items()):
        if "layers" not in name or weight.ndim != 2 or "router" in name or ".gate.weight" in name:
            continue
        rows, columns = weight.shape
        height = 1 if of_block is byte_scale else 16
        blocks = weight.view(rows // height, height, columns // 16, 16)
        stored = of_block(blocks.abs().amax((1, 3)))
        scale = torch.exp2(stored.float() - 127) if stored.dtype == torch.uint8 else stored
        small = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
        weights[name] = small.view(rows, columns)
        weights[f"{name}_scale_inv"] = stored
        exact[name] = (small.double() * scale.double()[:, None, :, None]).view(rows, columns).float()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    if settings is not None:
        edit_config(folder, quantization_config=settings)
    dequantised = load_file(folder / "model.safetensors") | exact
    plain = {name: weight for name, weight in dequantised.items() if not name.endswith("_scale_inv")}
    folder.with_name("exact").mkdir()
    save_file(plain, folder.with_name("exact") / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config.pop("quantization_config", None)
    (folder.with_name("exact") / "config.json").write_text(json.dumps(config))


def float_scale(largest: Tensor) -> Tensor:
    return largest.clamp(min=1e-6) / 448


def byte_scale(largest: Tensor) -> Tensor:
    return (torch.log2(largest.clamp(min=1e-6) / 448).ceil() + 127).to(torch.uint8)


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def logits(folder: Path) -> Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(IDS).logits


@pytest.mark.parametrize(
    ("kind", "settings", "scale"),
    [
        ("llama", FP8, float_scale),
        ("mixtral", FP8, float_scale),
        ("llama", {**FP8, "quant_method": "mxfp8", "weight_block_size": [1, 16]}, byte_scale),
    ],
    ids=["fp8", "fp8 experts", "mxfp8"],
)
def test_a_float8_checkpoint_is_saved_as_the_plain_model_that_it_stands_for(
    tmp_path: Path, kind: str, settings: dict[str, object], scale: Callable[[Tensor], Tensor]
) -> None:
    names = plain_checkpoint(tmp_path / "given", kind).keys()
    quantise(tmp_path / "given", settings, scale)
    model = load_causal_lm(tmp_path / "given", dtype=torch.float32, device="cpu")
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    save_model(model, byte_tokenizer(), tmp_path / "saved")
    written = load_file(tmp_path / "saved" / "model.safetensors")
    assert (written.keys(), {weight.dtype for weight in written.values()}) == (names, {torch.float32})
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    torch.testing.assert_close(logits(tmp_path / "saved"), logits(tmp_path / "exact"))


def test_a_float8_checkpoint_becomes_a_reward_model_in_the_precision_asked_for(tmp_path: Path) -> None:
    plain_checkpoint(tmp_path / "given", "llama")
    quantise(tmp_path / "given", FP8, float_scale)
    model = load_scalar_model(
        tmp_path / "given", dtype=torch.bfloat16, device="cpu", seed=0, pad_token_id=257
    )
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    save_model(model, byte_tokenizer(), tmp_path / "saved")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert torch.equal(again.model.layers[0].mlp.up_proj.weight, model.model.layers[0].mlp.up_proj.weight)


def test_a_gguf_file_of_8_bits_is_saved_as_the_plain_model_that_it_stands_for(tmp_path: Path) -> None:
    weights = plain_checkpoint(tmp_path / "exact", "llama")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    file = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(2)
    writer.add_context_length(512)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(258)
    for name, weight in weights.items():
        stored = weight
        if "q_proj" in name or "k_proj" in name:  # llama.cpp interleaves the halves of each rotary head
            stored = weight.view(4, 2, 4, 32).transpose(1, 2).reshape(32, 32)
        target = names.get_name(name, try_suffixes=(".weight",))
        assert target is not None
        if weight.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            packed = gguf.quants.quantize(stored.numpy(), kind)
            writer.add_tensor(target, packed, raw_dtype=kind)
            read = torch.from_numpy(np.array(gguf.quants.dequantize(packed, kind)))
            if stored is not weight:
                read = read.view(4, 4, 2, 32).transpose(1, 2).reshape(32, 32)
            weights[name] = read.contiguous()
        else:
            writer.add_tensor(target, weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    save_file(weights, tmp_path / "exact" / "model.safetensors", metadata={"format": "pt"})
    model = load_causal_lm(file, dtype=torch.float32, device="cpu")
    save_model(model, byte_tokenizer(), tmp_path / "saved")
    torch.testing.assert_close(logits(tmp_path / "saved"), logits(tmp_path / "exact"))


def test_scales_without_a_config_that_says_how_to_read_them_are_refused(tmp_path: Path) -> None:
    plain_checkpoint(tmp_path / "given", "llama")
    quantise(tmp_path / "given", None, float_scale)
    with pytest.raises(ModelError, match=r"holds quantised weights, with .*_scale_inv .* does not say how"):
        load_causal_lm(tmp_path / "given", dtype=torch.float32, device="cpu")


@pytest.mark.parametrize("method", ["gptq", "awq", "eetq"])
def test_a_quantisation_that_nothing_undoes_is_refused_by_name(tmp_path: Path, method: str) -> None:
    plain_checkpoint(tmp_path / "given", "llama")
    edit_config(tmp_path / "given", quantization_config={"quant_method": method, "bits": 4})
    with pytest.raises(ModelError, match=f"quantised with {method}, which cannot be turned back into plain"):
        load_causal_lm(tmp_path / "given", dtype=torch.float32, device="cpu")


def test_a_quantisation_that_transformers_does_not_know_is_refused_and_not_skipped(tmp_path: Path) -> None:
    plain_checkpoint(tmp_path / "given", "llama")
    edit_config(tmp_path / "given", quantization_config={"quant_method": "modelopt", "quant_algo": "FP8"})
    with pytest.raises(ModelError, match=r"given cannot be loaded: Unknown quantization type, got modelopt"):
        load_causal_lm(tmp_path / "given", dtype=torch.float32, device="cpu")
