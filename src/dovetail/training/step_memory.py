"""Read off a loaded model what the model of memory needs, for the decisions of a run.

Responsible for: the architecture of a model in memory, and its share in this process.
Not responsible for: bytes (planning/memory.py), how much there is (rlhf/build.py).
"""

from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel

from dovetail.model.forward import plain_model
from dovetail.model.widths import widths_of
from dovetail.parallel.shard import sharding_of
from dovetail.planning.architecture import Architecture, inner_copies
from dovetail.planning.memory import Held


def held_as(model: Any, *, is_averaged: bool = False) -> Held:
    """Return a loaded model, plain or with adapters, as this process holds it."""
    inner, sharded = plain_model(model), sharding_of(model)
    whole = architecture_of(inner)  # but for the heads, of which a divided model counts its own
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    num_weights = sum(parameter.numel() for parameter in model.parameters())
    num_trained = sum(parameter.numel() for parameter in learning)
    return Held(
        role=type(inner).__name__,
        architecture=replace(whole, inner_width=whole.inner_width // sharded.tensor_size),
        num_weights=num_weights,
        num_trained=num_trained,
        rank=int(num_trained < num_weights),
        element_bytes=inner.dtype.itemsize,
        stage=0 if sharded.layout.computes_on_shards else sharded.layout.stage,
        shard_size=sharded.layout.shard_size,
        is_offloaded=sharded.layout.offloads,
        is_averaged=is_averaged,
    )


def architecture_of(model: PreTrainedModel) -> Architecture:
    """Read the architecture of any Hugging Face decoder, plain or with adapters inside."""
    config: Any = model.config.get_text_config()
    names = [name.rpartition(".")[2] for name, _ in model.named_modules()]
    widths = widths_of(config)
    function = getattr(config, "activation_function", None) or getattr(config, "hidden_act", None)
    head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    return Architecture(
        num_layers=int(config.num_hidden_layers),
        width=widths.hidden,
        query_width=widths.num_heads * widths.head,
        key_width=widths.num_key_heads * widths.head,
        inner_width=widths.inner,
        vocabulary=0 if head is None else int(head.weight.shape[0]),
        inner_copies=inner_copies(function, is_gated=bool({"gate_proj", "gate_up_proj"} & set(names))),
        has_rms_norms=any(type(module).__name__.endswith("RMSNorm") for module in model.modules()),
        num_norms=4 if "pre_feedforward_layernorm" in names else 2,
        norms_heads="q_norm" in names,
    )
