"""Rotary embeddings whose frequencies depend on the length that is read: each sequence gets those of its length.

Responsible for: dynamic NTK and longrope, which transformers switches by the longest sequence of a forward, and for
dynamic NTK by the forwards before it.
Not responsible for: the rotations themselves, which stay those of transformers.

A packed batch and a decode step hold tokens of sequences of several lengths. The embedding is called once for each
length that makes a difference, and every token takes the result for the length of its own sequence.

Shapes: B rows of a batch, T tokens of a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

_FIXED = {"default", "linear", "yarn", "llama3", "proportional", "mrope"}
"""The kinds of rope whose frequencies are the same at every length."""


class SequenceRope(nn.Module):
    """The class that a rotary embedding of transformers becomes an instance of, in front of its own class."""

    lengths_T: Tensor | None = None
    """The length of each token's sequence; None: the rows of the batch are whole sequences."""

    def forward(
        self, x: Tensor, position_ids: Tensor, layer_type: str | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return cosines and sines as transformers does, of each token at the length of its sequence."""
        kind = {} if layer_type is None else {"layer_type": layer_type}
        if self.lengths_T is None or not _changes(self, layer_type):
            _forget(self, layer_type)
            whole: tuple[Tensor, Tensor] = super().forward(x, position_ids, **kind)
            return whole
        lengths_T = _distinct_lengths(self, self.lengths_T, layer_type)
        lengths = sorted(set(lengths_T.tolist()))
        chosen: list[Tensor] = []
        for length in lengths:
            _forget(self, layer_type)
            # transformers takes the length from the last position: one token more sets it.
            is_here_T = lengths_T == length
            last_B1 = position_ids.new_full((len(position_ids), 1), length - 1)
            places_BT = torch.cat([position_ids * is_here_T, last_B1], dim=1)
            parts = [part[:, :-1] for part in super().forward(x, places_BT, **kind)]
            chosen = [
                torch.where(is_here_T[:, None], part, before)
                for part, before in zip(parts, chosen or parts, strict=True)
            ]
        return chosen[0], chosen[1]


def give_sequences_their_rope(backbone: Any) -> None:
    """Make the rotary embeddings of a backbone take the length of each sequence from the forward's `layout`."""
    ropes = [rope for rope in _ropes(backbone) if not isinstance(rope, SequenceRope)]
    for rope in ropes:
        rope.__class__ = type(f"Sequence{type(rope).__name__}", (SequenceRope, type(rope)), {})
    if ropes:
        backbone.register_forward_pre_hook(partial(_set_lengths, ropes), with_kwargs=True)


def rope_limit(model: Any) -> int | None:
    """Return the longest sequence that is read with the frequencies of short ones; None if they never change."""
    limits = [_limit(rope, kind) for rope in _ropes(model) for kind in _kinds(rope)]
    return min(limits, default=None)


def reread_at(model: Any, length: int) -> bool:
    """Return whether a sequence that has just grown to `length` is read with other frequencies than before."""
    here = torch.tensor([length - 1, length])
    apart = [_distinct_lengths(rope, here, kind).tolist() for rope in _ropes(model) for kind in _kinds(rope)]
    return any(before != after for before, after in apart)


def depends_on_length(model: Any) -> bool:
    """Return whether a longer text is read with other frequencies, in modules that are known here or not."""
    return rope_limit(model) is not None or unknown_rope(model) is not None


def rope_limit_in(config: Any) -> int | None:
    """Return the `rope_limit` of a model with this config, as far as the config names it."""
    text = config.get_text_config()
    limits = [
        rope.get("original_max_position_embeddings", text.max_position_embeddings)
        if _rope_type(rope) == "longrope"
        else text.max_position_embeddings
        for rope in _named(text)
        if _rope_type(rope) not in _FIXED
    ]
    return min(limits, default=None)


def unknown_rope(model: Any) -> str | None:
    """Return the kind of rope that the config names, if it depends on the length in a module that is not known here."""
    kinds = {_rope_type(rope) for rope in _named(model.config.get_text_config())}
    changing = sorted(kinds - _FIXED)
    return changing[0] if changing and rope_limit(model) is None else None


def _named(text: Any) -> list[dict[str, Any]]:
    """Return a config's settings of ropes: one for all layers, or one for each kind of layer."""
    named = getattr(text, "rope_parameters", None) or {}
    per_layer = [rope for rope in named.values() if isinstance(rope, dict)]
    return per_layer or [named]


def _rope_type(rope: dict[str, Any]) -> str:
    return str(rope.get("rope_type", rope.get("type", "default")))


def _ropes(model: Any) -> Iterator[Any]:
    """Yield the rotary embeddings of which some frequency depends on the length."""
    for module in model.modules():
        if hasattr(module, "original_max_seq_len") and _kinds(module):
            yield module


def _kinds(rope: Any) -> list[str | None]:
    """Return the kinds of layers whose frequencies change; the kind is None where all layers share them."""
    types = getattr(rope, "rope_type", None)
    kinds: list[str | None] = list(types) if isinstance(types, dict) else [None]
    return [kind for kind in kinds if _changes(rope, kind)]


def _changes(rope: Any, kind: str | None) -> bool:
    return _type(rope, kind) == "longrope" or "dynamic" in _type(rope, kind)


def _type(rope: Any, kind: str | None) -> str:
    named = getattr(rope, "rope_type", None)
    return str(named.get(kind) if isinstance(named, dict) else named)


def _limit(rope: Any, kind: str | None) -> int:
    if _type(rope, kind) == "longrope":
        named = rope.config.rope_parameters
        return int((named if kind is None else named[kind])["original_max_position_embeddings"])
    return int(rope.original_max_seq_len)


def _distinct_lengths(rope: Any, lengths: Tensor, kind: str | None) -> Tensor:
    """Map lengths that share their frequencies to one length."""
    limit = _limit(rope, kind)
    return lengths.clamp(min=limit, max=limit + 1 if _type(rope, kind) == "longrope" else None)


def _forget(rope: Any, kind: str | None) -> None:
    """Undo the changes that longer sequences, read before, have left in a rope of dynamic NTK."""
    if "dynamic" not in _type(rope, kind):
        return
    prefix = "" if kind is None else f"{kind}_"
    original = getattr(rope, f"{prefix}original_inv_freq")
    current = getattr(rope, f"{prefix}inv_freq")
    setattr(rope, f"{prefix}inv_freq", original.to(current.device))
    setattr(rope, f"{prefix}max_seq_len_cached", rope.original_max_seq_len)


def _set_lengths(ropes: list[Any], _: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    """Set the lengths before each forward of the backbone; a layout without them reads one new token per sequence."""
    layout = kwargs.get("layout")
    for rope in ropes:
        rope.lengths_T = None if layout is None else getattr(layout, "lengths_T", None)
        if layout is not None and rope.lengths_T is None:
            rope.lengths_T = kwargs["position_ids"][0] + 1
