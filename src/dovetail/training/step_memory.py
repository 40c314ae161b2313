"""Estimate the memory of a gradient step from the numbers of an architecture, before anything is allocated.

Responsible for: bytes of optimiser state and gradients, and of the activations of one micro-batch.
Not responsible for: how much there is, and what follows from it (rlhf/build.py).

Shapes: D width of the hidden states, Q of all query heads, K of all key heads, F of the feed-forward layer,
V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from dovetail.model.linear_logprobs import CUDA_CHUNK_BYTES
from dovetail.model.shards import is_offloaded, local
from dovetail.model.widths import widths_of

MASTER, MOMENTS, GRADIENT, AVERAGE = 4, 8, 4, 4
"""Bytes of one trained weight, all float32: its master copy, Adam's two moments, the accumulated gradient, and
its moving average."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """The numbers that the activations of a decoder depend on."""

    num_layers: int
    width: int
    """D."""
    query_width: int
    """Q: heads times head width."""
    key_width: int
    """K: key heads times head width."""
    inner_width: int
    """F."""
    vocabulary: int
    """V of the language-model head; 0 if there is none (reward models, critics)."""
    inner_copies: int
    """The numbers that the feed-forward layer keeps for each of its F: 4 where it multiplies two projections (SwiGLU
    and its like), 2 where one goes through a function, 1 where that is ReLU, which needs its result alone."""
    has_rms_norms: bool
    """transformers' RMSNorms compute in float32 and keep that copy."""


def architecture_of(model: PreTrainedModel) -> Architecture:
    """Read the architecture of any Hugging Face decoder, plain or with adapters inside."""
    config: Any = model.config.get_text_config()
    names = [name.rpartition(".")[2] for name, _ in model.named_modules()]
    widths = widths_of(config)
    head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    return Architecture(
        num_layers=int(config.num_hidden_layers),
        width=widths.hidden,
        query_width=widths.num_heads * widths.head,
        key_width=widths.num_key_heads * widths.head,
        inner_width=widths.inner,
        vocabulary=0 if head is None else int(head.weight.shape[0]),
        inner_copies=_inner_copies(config, names),
        has_rms_norms=any(type(module).__name__.endswith("RMSNorm") for module in model.modules()),
    )


def _inner_copies(config: Any, module_names: Sequence[str]) -> int:
    if "gate_proj" in module_names or "gate_up_proj" in module_names:
        return 4
    function = getattr(config, "activation_function", None) or getattr(config, "hidden_act", None)
    return 1 if function == "relu" else 2


def layer_elements(of: Architecture) -> int:
    """Numbers that one layer keeps of one token for its backward pass, with attention that keeps no scores.

    Korthikanti et al. 2022 (arXiv:2205.05198), section 4.1, without dropout (whose masks are two of their 34 bytes)
    and without the 5 a s / h of stored scores (theirs is then 32 s b h bytes, 16 D numbers), for other shapes:

        norms and what they put out   4 D    (RMSNorm: 8 D, in units of two bytes)
        queries, keys, values         Q + 2 K
        attention's output            Q
        feed-forward                  2 F, before and after the activation; gated: 4 F; ReLU: F

    Within 15 % of what autograd keeps for OPT, GPT-NeoX, Llama, Qwen2, Mistral and Phi-3. Layers whose functions
    are written out term by term (GPT-2's and Gemma's GELU, soft caps, norms of queries and keys) keep more.
    """
    norms = (8 if of.has_rms_norms else 4) * of.width
    return norms + 2 * of.query_width + 2 * of.key_width + of.inner_copies * of.inner_width


def head_bytes(of: Architecture, *, tokens: int) -> int:
    """Float32 logits of one chunk on a GPU and their gradient, and twice the head's: the sum and what is added.

    See model/linear_logprobs.py; without a head, nothing.
    """
    return 2 * min(CUDA_CHUNK_BYTES, 4 * tokens * of.vocabulary) + 2 * 4 * of.vocabulary * of.width


def activation_bytes(of: Architecture, *, tokens: int, element_bytes: int, is_checkpointed: bool) -> int:
    """Activations of a micro-batch at their peak, the head's included.

    With checkpointing each layer keeps its input alone, D numbers, and one layer at a time is computed again.
    """
    layer = layer_elements(of)
    kept = of.num_layers * of.width + layer if is_checkpointed else of.num_layers * layer
    ends = 3 * of.width  # the embedding, the last norm, what the head reads
    return (kept + ends) * tokens * element_bytes + head_bytes(of, tokens=tokens)


def state_bytes(model: nn.Module, *, is_averaged: bool) -> int:
    """Estimate what training adds on the device to the weights that are here: gradients, optimiser, moving average."""
    total = 0
    for parameter in model.parameters():
        if parameter.requires_grad and not is_offloaded(parameter):
            master = MASTER if parameter.element_size() == 2 else 0
            total += local(parameter).numel() * (
                master + MOMENTS + GRADIENT + (AVERAGE if is_averaged else 0)
            )
    return total
