"""Plan the part of each weight that a rank of a tensor-parallel group holds (Shoeybi et al. 2019, arXiv:1909.08053).

Responsible for: the plan of each architecture, the partition of each weight, and which sizes of a group are possible.
Not responsible for: the modules and what they send (tensor.py), the processes (tensor_training.py).

Of two linear layers in a row the first is cut by columns, what it puts out (whole heads, or numbers of the
feed-forward layer), the second by rows, what it takes in: nothing is sent between them, and their result is a sum over
the group. Embedding and head are cut by the vocabulary. All other weights are whole in every process.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dovetail.errors import ConfigError
from dovetail.model.widths import Widths, widths_of

GENERATION, TRAINING = "tensor_parallel.generation", "tensor_parallel.training"
"""The settings that say how many processes share a model."""
ALIGNED_ROWS = 8
"""Rows of the vocabulary in a process are a multiple of this, which matrix products of half precision want."""

Sections = tuple[Literal["even", "keys"], ...]
"""The sections of a layer's output, end to end, each cut for itself: into equal parts, or by heads of keys or values,
which are repeated where there are fewer than processes."""
EVEN: Sections = ("even",)
KEYS: Sections = ("keys",)


@dataclass(frozen=True, slots=True)
class Plan:
    """The linear layers of an architecture and the way they are cut, by the last part of their names."""

    columns: Mapping[str, Sections]
    rows: tuple[str, ...]
    between: tuple[str, ...] = ()
    """Layers between the two that are whole but see this process's heads alone."""


_SEPARATE = Plan(
    {"q_proj": EVEN, "k_proj": KEYS, "v_proj": KEYS, "gate_proj": EVEN, "up_proj": EVEN},
    ("o_proj", "down_proj"),
)
PLANS: dict[str, Plan] = {
    "opt": Plan({"q_proj": EVEN, "k_proj": EVEN, "v_proj": EVEN, "fc1": EVEN}, ("out_proj", "fc2")),
    "gpt2": Plan({"c_attn": EVEN * 3, "c_fc": EVEN}, ("c_proj",)),
    # Query, key and value of a head are neighbours: equal parts are whole heads.
    "gpt_neox": Plan({"query_key_value": EVEN, "dense_h_to_4h": EVEN}, ("dense", "dense_4h_to_h")),
    "phi3": Plan({"qkv_proj": EVEN + KEYS * 2, "gate_up_proj": EVEN * 2}, ("o_proj", "down_proj")),
    **dict.fromkeys(("llama", "mistral", "qwen2", "gemma2"), _SEPARATE),
    **dict.fromkeys(("qwen3", "gemma3_text"), replace(_SEPARATE, between=("q_norm", "k_norm"))),
}
"""The plan of each architecture, by the `model_type` of its configuration."""


@dataclass(frozen=True, slots=True)
class Partition:
    """The part of a weight that a rank holds: pieces of one dimension, end to end, and zeros after them."""

    dim: int
    pieces: tuple[tuple[int, int], ...]
    """(start, length) of each."""
    num_zeros: int = 0

    def of(self, weight: Tensor) -> Tensor:
        """Return a copy of these pieces."""
        kept = [weight.narrow(self.dim, start, length) for start, length in self.pieces]
        if self.num_zeros:
            shape = list(weight.shape)
            shape[self.dim] = self.num_zeros
            kept.append(weight.new_zeros(shape))
        return torch.cat(kept, dim=self.dim)

    @property
    def length(self) -> int:
        """The size of the dimension afterwards."""
        return sum(length for _, length in self.pieces) + self.num_zeros


@dataclass(frozen=True, slots=True)
class Place:
    """A process of a group of `size`."""

    rank: int
    size: int

    def heads(self, widths: Widths) -> tuple[int, int]:
        """Return how many query heads, and how many key heads, the rank computes."""
        return widths.num_heads // self.size, max(1, widths.num_key_heads // self.size)

    def even(self, start: int, length: int) -> tuple[int, int]:
        """Its equal part of a section."""
        part = length // self.size
        return start + self.rank * part, part

    def keys(self, start: int, widths: Widths) -> tuple[int, int]:
        """Its part of a section of key heads, those that its heads of queries look at."""
        first = self.rank * widths.num_key_heads // self.size
        return start + first * widths.head, self.heads(widths)[1] * widths.head

    def vocabulary(self, num_rows: int) -> tuple[int, int, int]:
        """(first row, rows, rows of zeros after them); the sum of the last two is the same for all."""
        held = -(-num_rows // (ALIGNED_ROWS * self.size)) * ALIGNED_ROWS
        first = min(self.rank * held, num_rows)
        rows = min(held, num_rows - first)
        return first, rows, held - rows


def generation_partitions(model: PreTrainedModel, place: Place) -> dict[str, Partition]:
    """Return the partition of each weight that is not whole when generating, by name; plain or with adapters inside."""
    partitions = layer_partitions(model, place)
    ends = (model.get_input_embeddings(), model.get_output_embeddings())  # type: ignore[no-untyped-call]
    for path, layer in model.named_modules():
        if any(layer is end for end in ends):
            partitions |= {f"{path}.{key}": own for key, own in _vocabulary_partitions(layer, place)}
        elif path.rpartition(".")[2] in PLANS[model.config.model_type].rows:
            partitions |= {f"{path}.{key}": own for key, own in _row_bias_partitions(layer, place)}
    return partitions


def layer_partitions(model: PreTrainedModel, place: Place) -> dict[str, Partition]:
    """Return the partition of each weight inside the layers, by name.

    No two ranks hold the same number, except where they repeat a head of keys.
    """
    plan, widths = PLANS[model.config.model_type], widths_of(model.config)
    partitions: dict[str, Partition] = {}
    for path, layer in model.named_modules():
        name = path.rpartition(".")[2]
        if name in plan.columns:
            found = _column_partitions(layer, plan.columns[name], place, widths)
        elif name in plan.rows:
            found = _row_partitions(layer, place)
        else:
            continue
        partitions |= {f"{path}.{key}": own for key, own in found}
    return partitions


def training_partitions(model: PreTrainedModel, place: Place) -> dict[str, Partition]:
    """Return the partition of each weight that is not whole when training, by name; no rank holds zeros.

    Embedding and head stay whole unless each rank gets the same number of rows.
    """
    partitions = layer_partitions(model, place)
    ends = (model.get_input_embeddings(), model.get_output_embeddings())  # type: ignore[no-untyped-call]
    for path, layer in model.named_modules():
        if any(layer is end for end in ends) and is_cut_evenly(layer, place.size):
            for key, weight in layer.named_parameters(recurse=False):
                partitions[f"{path}.{key}"] = Partition(0, (place.even(0, len(weight)),))
    return partitions


def is_cut_evenly(end: Any, size: int) -> bool:
    """Return whether each rank trains the same number of rows of an embedding or head."""
    return len(end.weight) % size == 0


def partial_gradients(model: PreTrainedModel) -> set[str]:
    """Names of whole weights whose gradient in a process is but that process's share of a sum over the group.

    They work on, or feed, this process's part of a cut layer alone: of an adapter what its column layer takes in or its
    row layer puts out, and norms of single heads. All other whole weights see the group's sums, and have all of their
    gradient in every process.
    """
    plan = PLANS[model.config.model_type]
    names: set[str] = set()
    for path, layer in model.named_modules():
        name = path.rpartition(".")[2]
        if name in plan.between:
            names |= {f"{path}.{key}" for key, _ in layer.named_parameters()}
        for kept, half in ((name in plan.columns, "lora_A"), (name in plan.rows, "lora_B")):
            if kept:
                names |= {f"{path}.{half}.{adapter}.weight" for adapter in getattr(layer, half, ())}
    return names


def slice_bytes(model: PreTrainedModel, size: int) -> int:
    """Bytes of all weights that the first process of a group of `size` holds, the one with most."""
    partitions = {} if size == 1 else generation_partitions(model, Place(0, size))
    total = 0
    for name, weight in model.named_parameters():
        own, num = partitions.get(name), weight.numel()
        kept = num if own is None else num // weight.shape[own.dim] * own.length
        total += kept * weight.element_size()
    return total


def expect_divisible(config: Any, size: int, *, setting: str = GENERATION, model: str = "the model") -> None:
    """Raise ConfigError, with the sizes that are possible, unless `size` processes can share such a model.

    setting: who asks for it. model: which one, for the message.
    """
    reason = why_not_divisible(config, size, setting=setting, model=model)
    if reason is None:
        return
    if config.model_type not in PLANS:
        hint = f"set {setting}=1, or train one of these types: {', '.join(sorted(PLANS))}"
    else:
        possible = [n for n in range(1, 65) if why_not_divisible(config, n, setting=setting) is None]
        hint = f"set {setting} to one of {', '.join(map(str, possible))}"
    raise ConfigError(f"{setting} = {size}: {reason}", hint=hint)


def why_not_divisible(
    config: Any, size: int, *, setting: str = GENERATION, model: str = "the model"
) -> str | None:
    """Why `size` processes cannot share a model of this configuration; None if they can."""
    if size == 1:
        return None
    if config.model_type not in PLANS:
        return f"there is no plan to divide the layers of {model}, of type {config.model_type}"
    widths = widths_of(config)
    if widths.num_heads % size:
        return f"{model}'s {widths.num_heads} attention heads cannot be divided by {size}"
    if widths.num_key_heads % size and setting == TRAINING:
        return f"{model}'s {widths.num_key_heads} key heads cannot be divided by {size}"
    if widths.num_key_heads % size and size % widths.num_key_heads:
        return (
            f"{model}'s {widths.num_key_heads} key heads can be neither divided by {size} nor repeated evenly"
        )
    if widths.inner % size:
        return f"{model}'s feed-forward layers of width {widths.inner} cannot be divided by {size}"
    return None


def _vocabulary_partitions(layer: nn.Module, place: Place) -> Iterator[tuple[str, Partition]]:
    for key, weight in layer.named_parameters(recurse=False):
        first, rows, zeros = place.vocabulary(len(weight))
        yield key, Partition(0, ((first, rows),), zeros)


def _column_partitions(
    layer: nn.Module, sections: Sections, place: Place, widths: Widths
) -> Iterator[tuple[str, Partition]]:
    base = base_of(layer)
    out_dim = 1 if isinstance(base, Conv1D) else 0
    pieces = _pieces(sections, base.weight.shape[out_dim], place, widths)
    yield f"{_prefix(layer)}weight", Partition(out_dim, pieces)
    if base.bias is not None:
        yield f"{_prefix(layer)}bias", Partition(0, pieces)
    for adapter in getattr(layer, "lora_B", ()):
        yield f"lora_B.{adapter}.weight", Partition(0, pieces)


def _row_partitions(layer: nn.Module, place: Place) -> Iterator[tuple[str, Partition]]:
    base = base_of(layer)
    in_dim = 0 if isinstance(base, Conv1D) else 1
    pieces = (place.even(0, base.weight.shape[in_dim]),)
    yield f"{_prefix(layer)}weight", Partition(in_dim, pieces)
    for adapter in getattr(layer, "lora_A", ()):
        yield f"lora_A.{adapter}.weight", Partition(1, pieces)


def _row_bias_partitions(layer: nn.Module, place: Place) -> Iterator[tuple[str, Partition]]:
    """Give the bias to the first rank alone, because the results of all ranks are summed."""
    base = base_of(layer)
    if base.bias is not None:
        width = len(base.bias)
        yield (
            f"{_prefix(layer)}bias",
            Partition(0, ((0, width),)) if place.rank == 0 else Partition(0, (), width),
        )


def _prefix(layer: nn.Module) -> str:
    return "" if base_of(layer) is layer else "base_layer."


def _pieces(sections: Sections, width: int, place: Place, widths: Widths) -> tuple[tuple[int, int], ...]:
    """Return the pieces that a rank keeps of `width` outputs which lie in these sections."""
    keys = widths.num_key_heads * widths.head
    even = (width - keys * sections.count("keys")) // max(1, sections.count("even"))
    pieces, start = [], 0
    for section in sections:
        pieces.append(place.even(start, even) if section == "even" else place.keys(start, widths))
        start += even if section == "even" else keys
    return tuple(pieces)


def base_of(layer: nn.Module) -> Any:
    """Return the linear layer inside one with an adapter, or the layer itself."""
    return getattr(layer, "base_layer", layer)
