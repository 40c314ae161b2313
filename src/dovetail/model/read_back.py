"""Written model folders, read again and compared with the model in memory.

Responsible for: names, shapes and values of the weights, the output for a few tokens, and the tokenizer, of a
folder that was just written; the output of a merged model beside the adapted one.
Not responsible for: writing folders (save.py), loading models to use them (load.py).

Shapes: T tokens, N numbers of each token's output, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dovetail.batches import pack
from dovetail.errors import CheckpointError, ModelError
from dovetail.model.attention import ATTENTION_NAME, use_packed_attention
from dovetail.model.forward import hidden_states, plain_model, scalar_head
from dovetail.model.linear_logprobs import head_of

_NUM_TOKENS = 16
_LARGEST_GAP = 0.05
"""Relative, of a token in the middle of the order: rounding in half precision, on another device, stays below."""
_PROBE_TEXT = "Héllo, what is 12 x 7?\n  84 你好"


def expect_same_weights(folder: Path, model: PreTrainedModel, state: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError unless the folder gives a model with these weights and the output of `model`.

    state: the weights as they were to be written.
    """
    model_class: Any = type(model)
    loaded, report = model_class.from_pretrained(folder, dtype="auto", output_loading_info=True)
    found = loaded.state_dict()
    if absent := sorted({*report["missing_keys"], *(state.keys() - found.keys())}):
        raise _differs(folder, f"{absent[0]} is not there")
    if surplus := sorted({*report["unexpected_keys"], *(found.keys() - state.keys())}):
        raise _differs(folder, f"{surplus[0]} is no weight of the model")
    for name, weight in state.items():
        if weight.shape != found[name].shape:
            raise _differs(folder, f"{name} is {list(found[name].shape)}, and {list(weight.shape)} in memory")
        if not torch.equal(weight.to("cpu", found[name].dtype), found[name]):
            raise _differs(folder, f"{name} has other values than in memory")
    attention = model.config._attn_implementation
    if attention == ATTENTION_NAME:
        use_packed_attention(loaded)
    else:
        loaded.set_attn_implementation(attention)
    gap = output_gap(model, loaded)
    if not gap <= _LARGEST_GAP:
        raise _differs(folder, f"its output is {100 * gap:.1f} % away from that of the model in memory")


def expect_same_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise CheckpointError unless the folder gives a tokenizer with the same ids, end token and chat template."""
    loaded = type(tokenizer).from_pretrained(folder)
    for what, ours, theirs in (
        ("the ids of a text", tokenizer(_PROBE_TEXT)["input_ids"], loaded(_PROBE_TEXT)["input_ids"]),
        ("the vocabulary", tokenizer.get_vocab(), loaded.get_vocab()),
        ("the end token", tokenizer.eos_token_id, loaded.eos_token_id),
        ("the chat template", tokenizer.chat_template, loaded.chat_template),
    ):
        if ours != theirs:
            raise CheckpointError(
                f"{folder}: the tokenizer that was written is not the one in memory: {what} differs",
                hint="save the tokenizer with tokenizer.save_pretrained and see whether it loads again as it was",
            )


def expect_same_output(adapted: Any, merged: PreTrainedModel) -> None:
    """Raise ModelError unless the merged model computes what the model does with its adapters."""
    gap = output_gap(adapted, merged)
    if not gap <= _LARGEST_GAP:
        raise ModelError(
            f"merging the adapters into {type(merged).__name__} changes its output by {100 * gap:.1f} %: "
            "they cannot be merged",
            hint="use the adapter beside its base model, or train without adapters on these layers",
        )


@torch.no_grad()
def output_gap(one: Any, other: Any) -> float:
    """Return how far the outputs of two models for a few tokens are apart, relative to the first; NaN counts as far.

    The median over the tokens: a mixture of experts may send one token elsewhere on another device.
    """
    inner: Any = plain_model(one)
    rows = int(inner.get_input_embeddings().num_embeddings)
    ids = [(7 * i + 3) % rows for i in range(_NUM_TOKENS)]
    outputs_TN, others_TN = (_outputs(model, ids).double().cpu() for model in (one, other))
    gaps_T = (outputs_TN - others_TN).norm(dim=-1) / outputs_TN.norm(dim=-1).clamp(min=1e-12)
    return float(gaps_T.nan_to_num(nan=float("inf")).median())


def _outputs(model: Any, ids: Sequence[int]) -> Tensor:
    """[T, N]: logits, or [T, D + 1]: hidden states and score, computed without dropout; the mode stays as it was."""
    inner: Any = plain_model(model)
    was_training = inner.training
    inner.eval()
    try:
        if inner.config._attn_implementation == ATTENTION_NAME:
            batch = pack([list(ids)], [[False] * len(ids)]).to(inner.device)
            hidden_TD = hidden_states(model, batch)
        else:
            ids_1T = torch.tensor([list(ids)], device=inner.device)
            hidden_TD = inner.base_model(input_ids=ids_1T, use_cache=False).last_hidden_state[0]
        if hasattr(inner, "score"):
            return torch.cat([hidden_TD.float(), scalar_head(model, hidden_TD)[:, None]], dim=-1)
        logits_TN: Tensor = head_of(model).logits(hidden_TD)
        return logits_TN
    finally:
        inner.train(was_training)


def _differs(folder: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{folder} was written, and read again it is not the model in memory: {what}",
        hint="the folder was not kept; checkpoints are unharmed. Check the disk, and the versions of transformers "
        "and safetensors",
    )
