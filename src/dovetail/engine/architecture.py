"""A decoder described by its parameters and a few facts, in one form for all families.

Responsible for: the records that the fused decode step reads. Tensors in them are the modules' own parameters or
views of them, so whatever training writes into a parameter is what the next step reads.
Not responsible for: reading them off a model (families.py), or computing with them (fused.py).

Shapes: V vocabulary, D width, O and I output and input width of a product, R rank of an adapter, H heads, K head width,
P positions.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dovetail.model.attention import AttentionCall


@dataclass(frozen=True, slots=True)
class Norm:
    """The parameters of one LayerNorm or RMSNorm; its kind is that of the whole model."""

    weight_D: Tensor
    bias_D: Tensor | None


@dataclass(frozen=True, slots=True)
class NormKind:
    """The formula that all norms of a model share."""

    eps: float
    is_centred: bool
    """LayerNorm subtracts the mean first, RMSNorm does not."""
    offset: float
    """The number added to the weight: 1 in Gemma, else 0."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """A low-rank addition to a product: y += scaling * (x down') up'."""

    down_RI: Tensor
    up_OR: Tensor
    scaling: float


@dataclass(frozen=True, slots=True)
class Linear:
    """A product y = x weight' + bias, with an adapter beside it or without."""

    weight_OI: Tensor
    """A transposed view where the module stores its weight the other way round (GPT-2)."""
    bias_O: Tensor | None = None
    adapter: Adapter | None = None


@dataclass(frozen=True, slots=True)
class Rotary:
    """Rotary positions of the first 2 x len(inverse_frequencies) numbers of each head."""

    inverse_frequencies: Tensor
    scaling: float
    """The factor on cosine and sine (YaRN)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """One layer's attention."""

    call: AttentionCall
    qkv: tuple[Linear, ...]
    """The products for queries, keys and values, in this order; or a single one for all three."""
    out: Linear
    num_heads: int
    num_key_heads: int
    width: int
    is_interleaved: bool = False
    """The output lies as [H, 3, K], one head's query, key and value side by side (GPT-NeoX)."""
    query_norm: Norm | None = None
    key_norm: Norm | None = None
    rotary: Rotary | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedForward:
    """One layer's two or three products around an activation."""

    up: tuple[Linear, ...]
    """One product, or two of which the second is multiplied by the activation of the first."""
    activation: str
    """The name of the activation: relu, silu, gelu or gelu_tanh."""
    down: Linear


@dataclass(frozen=True, slots=True, kw_only=True)
class Join:
    """The step that adds a branch to the residual stream and prepares the input of what follows."""

    branch_norm: Norm | None = None
    """A norm of the branch before it is added (Gemma)."""
    norms: tuple[Norm, ...] = ()
    """Norms of the sum, one for each reader; without any, the reader takes the sum itself."""
    keeps_normed: bool = False
    """The stream goes on with the normed sum (OPT-350M, whose norms stand after the addition)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One decoder layer."""

    attention: Attention
    attention_join: Join | None
    """The join after attention; None where both branches read the same stream and are added together (GPT-NeoX)."""
    feed_forward: FeedForward
    feed_forward_join: Join
    """This step also prepares the input of the next layer, or of the head."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A whole decoder without its head."""

    embedding_VD: Tensor
    embedding_scale: float = 1.0
    positions_PD: Tensor | None = None
    """Learned position embeddings."""
    position_offset: int = 0
    """The row of position 0."""
    project_in: Linear | None = None
    project_out: Linear | None = None
    norm_kind: NormKind
    first: Join
    """The step that prepares the input of the first layer; it adds nothing."""
    layers: tuple[Layer, ...]
    residual_multiplier: float = 1.0
    """The factor on every branch before it is added (Granite)."""
