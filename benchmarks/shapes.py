"""What the benchmarks share: true shapes with random weights, floors, the predecessor's formulas, timing.

Floors are of the card that runs: `CEILINGS` has what was measured on each.
"""

from __future__ import annotations

import gc
import json
import random
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    OPTConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from dovetail.planning.architecture import catalogue


class Ceiling(NamedTuple):
    """The rates that a card reaches at best."""

    bytes_per_second: float
    """Reading device memory."""
    flop_per_second: float
    """bf16 products of 8192-cubed matrices of random numbers."""


CEILINGS = {"H200": Ceiling(4.455e12, 717e12), "H100": Ceiling(3.02e12, 811e12)}
"""By a part of the card's name; measured on one card of each kind."""


def ceiling() -> Ceiling:
    """Return the rates of the card that runs, or an H100's on other machines."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((found for part, found in CEILINGS.items() if part in name), CEILINGS["H100"])


def _opt(width: int, layers: int, heads: int, **changes: Any) -> OPTConfig:
    shape: dict[str, Any] = {
        "vocab_size": 50272, "hidden_size": width, "word_embed_proj_dim": width, "num_hidden_layers": layers,
        "num_attention_heads": heads, "ffn_dim": 4 * width, "max_position_embeddings": 2048, "dropout": 0.0,
        "attention_dropout": 0.0, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 2,
    }  # fmt: skip
    return OPTConfig(**{**shape, **changes})


def small_llama(vocabulary: int = 4096) -> LlamaConfig:
    """What two CPU cores can train in seconds."""
    return LlamaConfig(
        vocab_size=vocabulary, hidden_size=256, intermediate_size=688, num_hidden_layers=6, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=1024, tie_word_embeddings=True, pad_token_id=1,
        bos_token_id=None, eos_token_id=2,
    )  # fmt: skip


def _published(name: str) -> PretrainedConfig:
    """A shape that the planner knows."""
    plain = {
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "pad_token_id": 1,
        "bos_token_id": 2,
        "eos_token_id": 2,
    }
    return AutoConfig.for_model(**{**plain, **catalogue()[name]})


SHAPES: dict[str, Callable[[], PretrainedConfig]] = {
    **{name: partial(_published, name) for name in catalogue()},
    "small": small_llama,
    "tiny": lambda: _opt(32, 2, 4, vocab_size=128),
    "tiny-350m": lambda: _opt(32, 2, 4, vocab_size=128, do_layer_norm_before=False, word_embed_proj_dim=16),
}


def causal_lm(shape: str | PretrainedConfig, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Random weights, made on the device."""
    return _made(AutoModelForCausalLM, shape, device, dtype)


def scalar_model(shape: str, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """The same with a scalar head."""
    return _made(AutoModelForSequenceClassification, shape, device, dtype, num_labels=1)


def _made(auto: Any, shape: Any, device: torch.device, dtype: torch.dtype, **changes: Any) -> PreTrainedModel:
    config = SHAPES[shape]() if isinstance(shape, str) else shape
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model: PreTrainedModel = auto.from_config(config, attn_implementation="sdpa")
    finally:
        torch.set_default_dtype(before)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.eos_token_id = None  # lengths are what the benchmark says they are
    return model.eval()


def prompts_of(count: int, length: int, vocabulary: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, vocabulary) for _ in range(length)] for _ in range(count)]


def ragged_lengths(count: int, seed: int = 0, low: int = 16, high: int = 512) -> list[int]:
    """Answer lengths with a long tail: log-normal, median 100, cut to low..high."""
    rng = random.Random(seed)
    return [max(low, min(high, round(rng.lognormvariate(4.605, 0.9)))) for _ in range(count)]


def num_parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def kv_bytes_per_token(config: PretrainedConfig, dtype: torch.dtype) -> int:
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * width * dtype.itemsize


def generation_floor(
    model: PreTrainedModel, prompt: int, lengths: Sequence[int], batch: int, dtype: torch.dtype
) -> float:
    """Seconds: prefill at the matrix ceiling, then decode steps that read all weights and the cache once.

    With `batch` answers at a time always running: as few steps as lengths allow.
    """
    total = sum(lengths)
    prefill = 2 * num_parameters(model) * prompt * len(lengths) / ceiling().flop_per_second
    steps = max(max(lengths), total / min(batch, len(lengths)))
    cached = sum(length * (prompt + length / 2) for length in lengths)
    weights = num_parameters(model) * dtype.itemsize * steps
    return prefill + (weights + cached * kv_bytes_per_token(model.config, dtype)) / ceiling().bytes_per_second


def decode_floor(model: PreTrainedModel, batch: int, context: float, dtype: torch.dtype) -> float:
    """Return the seconds in which one step reads all weights and the cache once; of untied embeddings only the head."""
    weights = num_parameters(model)
    if not model.config.tie_word_embeddings:
        embedding: Any = model.get_input_embeddings()  # type: ignore[no-untyped-call]
        weights -= embedding.weight.numel()
    cached = batch * context * kv_bytes_per_token(model.config, dtype)
    return (weights * dtype.itemsize + cached) / ceiling().bytes_per_second


def predecessor_generation_flop(config: PretrainedConfig, sequences: int, length: int) -> float:
    """DeepSpeed-Chat's perf.py: 24 B s L h^2 (1 + s / 6h + V / 16Lh), forward over whole sequences of length s."""
    h, layers, vocabulary = config.hidden_size, config.num_hidden_layers, config.vocab_size
    inner = 1 + length / (6 * h) + vocabulary / (16 * layers * h)
    return 24 * sequences * length * layers * h * h * inner


def predecessor_training_flop(
    config: PretrainedConfig,
    sequences: int,
    length: int,
    *,
    checkpointing: bool = False,
    rank: int | None = None,
) -> float:
    """The same formula times 3, or 4 with checkpointing; with LoRA less 1 - 2 r / h."""
    passes = 4.0 if checkpointing else 3.0
    if rank:
        passes -= 1 - 2 * rank / config.hidden_size
    return passes * predecessor_generation_flop(config, sequences, length)


def now(device: torch.device) -> float:
    """Seconds, when everything sent to the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def fresh(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def memory(device: torch.device) -> dict[str, float]:
    if device.type != "cuda":
        return {}
    return {
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "reserved_gib": round(torch.cuda.memory_reserved() / 2**30, 3),
    }


def setting(device: torch.device) -> dict[str, str]:
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"cpu x {torch.get_num_threads()}"
    return {"device": name, "torch": torch.__version__}


def show(**row: Any) -> None:
    """One JSON line, numbers to five digits."""
    print(json.dumps({k: _short(v) for k, v in row.items()}), flush=True)


def _short(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _short(v) for k, v in value.items()}
    return float(f"{value:.5g}") if isinstance(value, float) else value
