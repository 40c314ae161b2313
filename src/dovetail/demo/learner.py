"""The demo's own model: a Llama of about a million weights.

Responsible for: its shape and its random initial weights. Not responsible for: training it.
"""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def small_llama(tokenizer: PreTrainedTokenizerFast, *, width: int = 160, layers: int = 3) -> LlamaConfig:
    """Return a config of three layers of width 160, the shape that learns most in a minute on two cores."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 32,
        max_position_embeddings=256,
        # Three times the usual: so small a model learns far faster from there.
        initializer_range=0.06,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def new_model(config: LlamaConfig, *, seed: int) -> LlamaForCausalLM:
    """Make a model with random weights that depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)  # type: ignore[no-untyped-call]
