"""Tiny real models and a byte tokenizer, so that tests run the real code in milliseconds.

Every architecture is the true Hugging Face class with a handful of dimensions and random weights large enough
that wrong masks, positions or heads show.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

END = "<|end|>"
PAD = "<|pad|>"


def byte_tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """256 byte tokens, an end-of-turn token (eos, id 256) and a pad token (id 257); no BOS."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=END, pad_token=PAD)
    tokenizer.chat_template = chat_template
    return tokenizer


_SHARED = {"vocab_size": 258, "eos_token_id": 256, "pad_token_id": 257, "bos_token_id": None}


def _opt(**changes: object) -> OPTConfig:
    shape = dict(hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=512,
                 word_embed_proj_dim=32, dropout=0.1, init_std=0.2)  # fmt: skip
    return OPTConfig(**{**_SHARED, **shape, **changes})


def _llama(**changes: object) -> LlamaConfig:
    shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.2,
                 tie_word_embeddings=False)  # fmt: skip
    return LlamaConfig(**{**_SHARED, **shape, **changes})


def _gpt2() -> GPT2Config:
    return GPT2Config(**_SHARED, n_embd=32, n_layer=2, n_head=4, n_positions=512, initializer_range=0.2)


def _neox() -> GPTNeoXConfig:
    return GPTNeoXConfig(**_SHARED, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                         max_position_embeddings=512, initializer_range=0.2)  # fmt: skip


def _qwen2() -> Qwen2Config:
    return Qwen2Config(**_SHARED, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                       num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.2,
                       tie_word_embeddings=True)  # fmt: skip


_WINDOW = 4  # far below the lengths that tests use


def _grouped(config_class: type[PretrainedConfig], **changes: object) -> PretrainedConfig:
    """The shape of `_llama` in one of its many relatives."""
    shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, head_dim=8, max_position_embeddings=512, initializer_range=0.2)  # fmt: skip
    return config_class(**{**_SHARED, **shape, **changes})


TINY: dict[str, Callable[[], PretrainedConfig]] = {
    "opt": _opt,
    "opt-post-norm": lambda: _opt(do_layer_norm_before=False, word_embed_proj_dim=16),
    "gpt2": _gpt2,
    "gpt-neox": _neox,
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": lambda: _grouped(Qwen3Config),
    "phi3": lambda: _grouped(Phi3Config),
    "mistral": lambda: _grouped(MistralConfig, sliding_window=_WINDOW),
    "gemma2": lambda: _grouped(
        Gemma2Config,
        sliding_window=_WINDOW,
        query_pre_attn_scalar=8,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
    ),
    "gemma3": lambda: _grouped(
        Gemma3TextConfig,
        sliding_window=_WINDOW,
        query_pre_attn_scalar=8,
        layer_types=["sliding_attention", "full_attention"],
    ),
}
"""Name -> configuration. `opt-post-norm` has OPT-350M's shape: post-norm, no final norm, projected embeddings;
mistral and the gemmas have sliding windows."""

PADDED: dict[str, Callable[[], PretrainedConfig]] = {
    "bloom": lambda: BloomConfig(**_SHARED, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.2),
}
"""The same for classes that keep their own attention: they warn, and run over padded batches."""


def tiny_model(name: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A tiny random causal LM in evaluation mode, reproducible whatever ran before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = (TINY | PADDED)[name]()
        # The default, SDPA, leaves out soft caps without a word; eager does its softmax in float32.
        attention = "eager" if getattr(config, "attn_logit_softcapping", None) else None
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
        for parameter in model.parameters():  # biases and norms too: a forgotten one must show
            parameter.data += 0.05 * torch.randn_like(parameter)
    return model.to(dtype).eval()
