"""The way a model reads the sequences of a batch: packed, padded, or each alone.

Responsible for: what a class declares, and remembering what the probe of a model has found.
Not responsible for: finding it (probe.py), doing it (forward.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedModel

from dovetail.model.rope import unknown_rope

# Layers of any other kind (state spaces, convolutions, chunked attention) would mix the packed sequences.
_PACKABLE_LAYERS = frozenset({"full_attention", "sliding_attention", "attention"})

ReadingWay = Literal["packed", "padded", "alone"]


@dataclass(frozen=True, slots=True)
class Reading:
    """The way a model reads the sequences of a batch."""

    way: ReadingWay
    reason: str | None = None
    """The reason why it is not packed."""


def is_probed(model: PreTrainedModel) -> bool:
    """Return whether the way it reads was found by trying (probe.py)."""
    return hasattr(model.base_model, "dovetail_reading")


def reading_of(model: PreTrainedModel) -> Reading:
    """Return what the probe of the model has found; without a probe, what its class declares."""
    backbone: Any = model.base_model
    found: Reading | None = getattr(backbone, "dovetail_reading", None)
    if found is None:
        obstacle = packing_obstacle(model)
        found = Reading("packed") if obstacle is None else Reading("padded", obstacle)
    return found


def remember_reading(model: PreTrainedModel, reading: Reading) -> None:
    """Let the model, its copies and all that is built on its backbone read in this way."""
    backbone: Any = model.base_model
    backbone.dovetail_reading = reading


def why_not_packed(model: PreTrainedModel) -> str | None:
    """Return why a model does not run over packed batches, None if it does."""
    return reading_of(model).reason


def packing_obstacle(model: PreTrainedModel) -> str | None:
    """Return what a class declares that rules packed batches out, or None."""
    name = type(model).__name__
    if not has_attention_switch(model):
        return f"{name} keeps its own attention (it bypasses the attention registry)"
    if getattr(model, "_is_stateful", False):
        return f"{name} carries a state from token to token, which would leak between packed sequences"
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    if not kinds <= _PACKABLE_LAYERS:
        return f"{name} has layers that mix packed sequences: {', '.join(sorted(kinds - _PACKABLE_LAYERS))}"
    if any(name.rpartition(".")[2] == "sinks" for name, _ in model.named_parameters()):
        return f"{name} has attention sinks"
    if (rope := unknown_rope(model)) is not None:
        return (
            f"{name} has a rope ({rope}) whose frequencies depend on the length read, in a class of its own"
        )
    return None


def has_attention_switch(model: PreTrainedModel) -> bool:
    """Return whether the class declares that its attention can be replaced."""
    return bool(getattr(model, "_supports_attention_backend", False) and model._can_set_attn_implementation())
