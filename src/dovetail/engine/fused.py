"""A decode step in six or seven kernels a layer, on the modules' own parameters, and the proof that it may be used.

Responsible for: the order of a step's operations for every family, and comparing its logits with the modules'.
Not responsible for: the families (families.py), the operations (fused_ops.py, kernels/fused_ops.py), prompts, which
the modules read, or the draw.

Nothing is copied: the step reads parameters where they are. Code that moves them must build a new step, and
capture a new graph (`PackedModules.recorded_state`).

Shapes: B rows, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dovetail.engine import fused_ops
from dovetail.engine.architecture import Architecture, Layer, Rotary
from dovetail.engine.families import architecture_of
from dovetail.engine.forward import PackedModules
from dovetail.engine.fused_ops import Angles, Branch
from dovetail.engine.kv_cache import KVArena, pages_for
from dovetail.engine.parameters import UnreadableError
from dovetail.model.attention import Layout
from dovetail.model.forward import context_of
from dovetail.model.linear_logprobs import head_of
from dovetail.model.tolerance import is_exact, is_explained, nudged_embeddings

ROUNDING = {torch.float64: 1e-5, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""The norm of the difference of centred logits, as a fraction of their norm, that rounding explains in any model."""
_PROBED = (3, 70, 30, 0)
"""The old tokens of the rows that are compared, the most informative first; 70 fill a page and begin another."""


class FusedStep:
    """The computation of one decode step, for one model whose parameters stay where they are."""

    def __init__(self, model: PreTrainedModel, architecture: Architecture) -> None:
        self._head = head_of(model)
        self._architecture = architecture
        self._ops: Any = _operations(architecture.embedding_VD.device)

    def next_logits(self, ids_B: Tensor, positions_B: Tensor, layout: Layout) -> Tensor:
        """Compute logits [B, V] as `PackedModules.next_logits` does, for one new token a row."""
        ops, architecture = self._ops, self._architecture
        angles = _Angles(positions_B, architecture.embedding_VD.dtype)
        stream_BD, inputs = self._joined(ops.embed(ids_B, positions_B, architecture), (), architecture.first)
        for layer in architecture.layers:
            stream_BD, inputs = self._layer(layer, stream_BD, inputs, angles, layout)
        hidden_BD = inputs[0]
        if architecture.project_out is not None:
            hidden_BD = ops.product(hidden_BD, architecture.project_out)
        return self._head.logits(hidden_BD)

    def _layer(
        self, layer: Layer, stream_BD: Tensor, inputs: tuple[Tensor, ...], angles: _Angles, layout: Layout
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        ops, attention = self._ops, layer.attention
        qkv_BO = ops.products(inputs[0], attention.qkv)
        mixed_BO = ops.attend(
            qkv_BO, attention, angles.of(attention.rotary), self._architecture.norm_kind, layout
        )
        attended = ops.branch(mixed_BO, attention.out)
        if layer.attention_join is None:
            branches: tuple[Branch, ...] = (attended, self._feed_forward(layer, inputs[1]))
        else:
            stream_BD, inputs = self._joined(stream_BD, (attended,), layer.attention_join)
            branches = (self._feed_forward(layer, inputs[0]),)
        return self._joined(stream_BD, branches, layer.feed_forward_join)

    def _feed_forward(self, layer: Layer, x_BD: Tensor) -> Branch:
        inner_BO = self._ops.activated(x_BD, layer.feed_forward)
        branch: Branch = self._ops.branch(inner_BO, layer.feed_forward.down)
        return branch

    def _joined(
        self, stream_BD: Tensor, branches: tuple[Branch, ...], how: Any
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        architecture = self._architecture
        joined: tuple[Tensor, tuple[Tensor, ...]] = self._ops.join(
            stream_BD, branches, how, architecture.norm_kind, architecture.residual_multiplier
        )
        return joined


class _Angles:
    """The angles of a step, computed once for all layers that share the frequencies."""

    def __init__(self, positions_B: Tensor, dtype: torch.dtype) -> None:
        self._positions_B = positions_B
        self._dtype = dtype
        self._known: dict[int, Angles] = {}

    def of(self, rotary: Rotary | None) -> Angles | None:
        """Return cosines and sines, rounded to the model's precision as the modules do."""
        if rotary is None:
            return None
        key = id(rotary.inverse_frequencies)
        if key not in self._known:
            angles = self._positions_B.float()[:, None] * rotary.inverse_frequencies.float()
            cosine, sine = angles.cos(), angles.sin()
            if rotary.scaling != 1.0:
                cosine, sine = cosine * rotary.scaling, sine * rotary.scaling
            self._known[key] = Angles(cosine.to(self._dtype), sine.to(self._dtype))
        return self._known[key]


LayoutOf = Callable[[KVArena, Sequence[Sequence[int]], Sequence[int]], Layout]
"""A function that makes the layout of rows with these pages, and so many tokens stored."""


@torch.no_grad()
def fused_step(
    modules: PackedModules, arena: KVArena, layout_of: LayoutOf
) -> tuple[FusedStep | None, str | None]:
    """Build the fused step of a model, or say why the modules must decode.

    The step is compared with the modules on a few tokens with random keys and values before them, in an arena that
    no sequence uses.
    """
    try:
        step = FusedStep(modules.model, architecture_of(modules))
    except UnreadableError as error:
        return None, str(error)
    error_B, noise_B = _disagreement(step, modules, arena, layout_of)
    if is_explained(error_B, ROUNDING[arena.shape.dtype], noise_B):
        return step, None
    return None, f"the fused step's logits differ from the modules' by {float(error_B.mean()):.1%}"


def _disagreement(
    step: FusedStep, modules: PackedModules, arena: KVArena, layout_of: LayoutOf
) -> tuple[Tensor, Tensor | None]:
    """Return how far the step's logits are from the modules', and how far rounding moves the modules' own.

    The second is None where rounding is too small to matter. Both are norms of the difference of centred logits, as
    fractions of their norm, of some rows.
    """
    lengths, tables = _probed_rows(arena.num_pages, context_of(modules.model))
    arena.fill_randomly(sum(map(len, tables)))
    ids_B = torch.arange(len(lengths), device=arena.device) * 7 % modules.vocabulary
    positions_B = torch.tensor(lengths, device=arena.device)

    def logits_of(next_logits: Callable[..., Tensor]) -> Tensor:
        logits_BV = next_logits(ids_B, positions_B, layout_of(arena, tables, lengths)).double()
        return logits_BV - logits_BV.mean(dim=-1, keepdim=True)

    def distance(logits_BV: Tensor) -> Tensor:
        fraction_B: Tensor = (logits_BV - expected_BV).norm(dim=-1) / expected_BV.norm(dim=-1)
        return fraction_B

    with modules.our_attention():
        expected_BV = logits_of(modules.next_logits)
        error_B = distance(logits_of(step.next_logits))
        if is_exact(arena.shape.dtype):
            return error_B, None
        with nudged_embeddings(modules.model):
            return error_B, distance(logits_of(modules.next_logits))


def _probed_rows(num_pages: int, context: int | None) -> tuple[list[int], list[list[int]]]:
    """Choose how many old tokens each row has, and its pages, as far as pages and context reach."""
    lengths: list[int] = []
    tables: list[list[int]] = []
    used = 0
    for length in _PROBED:
        needed = pages_for(length + 1)
        if used + needed <= num_pages and (context is None or length < context):
            lengths.append(length)
            tables.append(list(range(used, used + needed)))
            used += needed
    return lengths, tables


def _operations(device: torch.device) -> Any:
    """Return the kernels where there is a GPU, else the plain operations."""
    if device.type != "cuda":
        return fused_ops
    from dovetail.engine.kernels import fused_ops as kernels  # Triton is there on GPUs only

    return kernels
