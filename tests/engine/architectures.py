"""A tiny random model of every class that transformers offers for causal language models.

Windows, chunks and the limits of ropes are far below the lengths that the sweep reads.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 64
CONTEXT = 128
LIMIT = 24
"""Tokens of windows and chunks, and of what ropes call their original context."""

_SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(
        ("hidden_size", "n_embd", "d_model", "embedding_size", "emb_dim", "attention_hidden_size", "lru_width"), 32
    ),
    **dict.fromkeys(
        ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_decoder_layers"), 2
    ),
    **dict.fromkeys(("encoder_layers", "num_encoder_layers", "n_group", "topk_group", "mamba_n_groups", "n_groups"), 1),
    **dict.fromkeys(
        (
            "num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads", "encoder_attention_heads",
            "decoder_attention_heads", "num_encoder_attention_heads", "num_decoder_attention_heads",
        ),
        4,
    ),
    **dict.fromkeys(("num_key_value_heads", "linear_num_key_heads", "index_n_heads", "num_experts_per_tok"), 2),
    **dict.fromkeys(
        (
            "head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "linear_key_head_dim", "rotary_dim",
            "linear_value_head_dim", "index_head_dim", "d_kv", "d_head", "mamba_d_head", "mamba_n_heads", "state_size",
            "mamba_d_state", "query_pre_attn_scalar", "hidden_size_per_layer_input", "mamba_chunk_size",
        ),
        8,
    ),
    **dict.fromkeys(
        (
            "intermediate_size", "encoder_ffn_dim", "decoder_ffn_dim", "ffn_dim", "n_inner", "ffn_hidden_size", "dff",
            "d_inner", "d_ff",
        ),
        48,
    ),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 24),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "linear_num_value_heads"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length"), CONTEXT),
    **dict.fromkeys(("sliding_window", "attention_chunk_size", "attention_window_size"), LIMIT),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "index_topk"), 16),
    **dict.fromkeys(("initializer_range", "init_std"), 0.2),
    **dict.fromkeys(("mamba_expand", "expand"), 2),
    **dict.fromkeys(("conv_kernel", "mamba_d_conv"), 4),
    "first_k_dense_replace": 1, "num_nextn_predict_layers": 0, "max_window_layers": 0, "mlp_only_layers": [],
    "use_sliding_window": True, "is_decoder": True, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "type_vocab_size": 2,
}  # fmt: skip
"""What all configs are given that know the name."""

_MAY_BE_NONE = {"rotary_dim", "n_inner", "q_lora_rank", "sliding_window", "attention_chunk_size", "head_dim"}
"""Names whose None says that the class has no such thing, and stays."""

_HEAD_WIDTH = {"head_dim": 8}
_LATENT = {"num_key_value_heads": 4}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_TWO_KINDS = {"layer_types": ["linear_attention", "full_attention"]}

CHANGES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        (
            "axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa",
            "longcat_flash", "minicpm3", "youtu",
        ),
        _LATENT,
    ),
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"), _TWO_KINDS),
    **dict.fromkeys(("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral"), _HEAD_WIDTH),
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {
        "head_dim": 128, "rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE},
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0}},
    "doge": {"keep_window_size": LIMIT},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "falcon": {"head_dim": ...},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2,
                     "num_kv_shared_layers": 2, "laurel_rank": 4, "altup_num_inputs": 2, "intermediate_size": [48] * 4,
                     "activation_sparsity_pattern": [0.0] * 4},
    "gemma4_text": {"head_dim": ..., "global_head_dim": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": LIMIT},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {**_TWO_KINDS, **_LATENT, "linear_head_dim": 8, "linear_num_heads": 4, "num_experts_per_token": 2},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "llama4_text": {"intermediate_size_mlp": 48, "no_rope_layers": [1, 0], "moe_layers": [1]},
    "mamba2": {"num_heads": 8, "head_dim": 8, "chunk_size": 8},
    "nemotron_h": {"chunk_size": 8, "mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8},
    "phimoe": {"sliding_window": LIMIT},
    "prophetnet": {"num_hidden_layers": ...},
    "qwen4_exp_text": {**_TWO_KINDS, "indexer_compress_ratio": 4, "indexer_budget": 16, "indexer_n_heads": 2,
                       "indexer_kv_heads": 1, "indexer_head_dim": 8},
    "qwen2_moe": {"max_window_layers": 2},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local", "local"], "num_hidden_layers": ...,
                 "attention_head_size": 8, "local_attn_chunk_length": 8, "feed_forward_size": 48},
    "xlnet": {"max_position_embeddings": ...},
    "xlstm": {"v_head_dim": ..., "head_dim": ..., "num_hidden_layers": 2, "num_blocks": 2},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["mamba", "hybrid"] * 2, "num_hidden_layers": 4, "attention_hidden_size": 64,
              "attention_head_dim": 16, "n_mamba_heads": 2},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"] * 2, "num_hidden_layers": 4, "hybrid_layer_ids": [1, 3],
               "attention_hidden_size": 64, "attention_head_dim": 16, "mamba_headdim": 8, "mamba_ngroups": 1},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
"""What some need beside. `...`: leave the name out."""

_WITH_OTHER_INPUTS = "has an encoder of images, sound or another text; the loader refuses it by its config"
UNMADE: dict[str, str] = {
    **dict.fromkeys(
        (
            "emu3",
            "fuyu",
            "gemma3",
            "gemma3n",
            "gemma4",
            "gemma4_unified",
            "git",
            "got_ocr2",
            "llama4",
            "mllama",
            "musicgen",
            "musicgen_melody",
            "phi4_multimodal",
            "qwen3_5",
            "qwen3_5_moe",
            "qwen4_exp",
            "moshi",
        ),
        _WITH_OTHER_INPUTS,
    ),
    **dict.fromkeys(
        ("gemma4_assistant", "gemma4_unified_assistant"),
        "drafts for another model and has no vocabulary of its own",
    ),
    "blt": "reads patches of bytes through three models, with hash tables of 500,000 rows",
}
"""Model types without a tiny model here, and why."""

EXTRA: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, dynamic NTK": ("llama", {"rope_parameters": {**_ROPE, "rope_type": "dynamic", "factor": 4.0}}),
    "phi3, longrope": (
        "phi3",
        {
            "original_max_position_embeddings": LIMIT,
            "rope_parameters": {
                "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4,
                "long_factor": [4.0, 8.0, 16.0, 32.0], "original_max_position_embeddings": LIMIT,
            },
        },
    ),
}  # fmt: skip
"""Ropes that depend on the length, as further rows of the table."""

MODEL_TYPES = [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name not in UNMADE]


def tiny_architecture(model_type: str, changes: Mapping[str, Any] | None = None) -> PreTrainedModel:
    """A random model of a type, float32, in evaluation mode."""
    config_class: Any = CONFIG_MAPPING[model_type]
    default = config_class()
    given = {name: value for name, value in _SIZES.items() if _knows(default, name)}
    given |= CHANGES.get(model_type, {}) | dict(changes or {})
    config = config_class(**{name: value for name, value in given.items() if value is not ...})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def _knows(config: Any, name: str) -> bool:
    with contextlib.suppress(Exception):  # some names differ from layer to layer
        return hasattr(config, name) and not (name in _MAY_BE_NONE and getattr(config, name) is None)
    return False
