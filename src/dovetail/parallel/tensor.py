"""A model divided over a tensor-parallel group, to generate with.

Responsible for: the modules of one process, which are those of the model with narrower layers, and their weights, cut
out of the training model's and there for one phase.
Not responsible for: which part of which weight (tensor_plan.py), collectives (tensor_training.py), training.

The weights are plain tensors, not DTensors: nothing is dispatched per operation, and a decode step can be captured. A
process sends what its row layers and its embedding put out, once per layer; the reader of the logits
(engine/forward.py) puts the head's columns together.

Shapes: T tokens, D width.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dovetail.errors import ConfigError
from dovetail.model.copies import copy_of
from dovetail.model.forward import plain_model
from dovetail.model.slices import slice_of
from dovetail.parallel.narrow import count_fewer_heads, expect_narrower_output, look_up
from dovetail.parallel.shard import replace_weights, sharding_of, share_buffers
from dovetail.parallel.tensor_plan import (
    GENERATION,
    PLANS,
    Partition,
    Place,
    expect_divisible,
    generation_partitions,
)
from dovetail.parallel.world import TensorGroup


class SplitModel:
    """This rank's slices of a model, which have memory within `filled` alone."""

    def __init__(self, model: Any, group: TensorGroup, *, device: torch.device) -> None:
        """model: as training has it, plain or peft-wrapped, after `shard_model`.

        Raises ConfigError if the group's size does not divide it.
        """
        self.group = group
        self._model = model
        self._device = device
        source = sharding_of(model).generation_model
        expect_divisible(plain_model(source).config, group.size)
        self.modules = copy_of(source, device=torch.device("meta"))
        """The model's own classes, wrapped as it is; what generates."""
        share_buffers(model, self.modules)
        inner, place = plain_model(self.modules), Place(group.rank, group.size)
        _expect_equal_ends(inner)
        self._partitions = generation_partitions(inner, place)
        _make_layers_narrow(inner, self._partitions, group)
        _look_up_together(inner, place, group)
        count_fewer_heads(inner, place)

    @contextmanager
    def filled(self) -> Iterator[Any]:
        """Fill the slices with the weights as they are now, for the block. A collective; blocks may not be nested.

        The model is never whole on a device: one layer after the other is gathered and cut. A slice that training has
        as well is not put together first, and not copied unless it is sharded.
        """
        start = time.monotonic()
        trained = plain_model(self._model)
        sharded = sharding_of(trained)
        layout = sharded.layout
        sharded.reshard()
        inner = plain_model(self.modules)
        held = {name for name, weight in trained.named_parameters() if self._is_held(name, weight)}
        computes_on_shards = layout.computes_on_shards or not layout.is_sharded
        slices = {
            name: weight
            if name in held and computes_on_shards
            else self._cut(name, weight, is_slice=name in held)
            for name, weight in sharded.whole_weights(slices=held)
        }
        replace_weights(inner, lambda name, _: slices[name])
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # once per generate phase, so that the seconds are true
        layout.gather_seconds += time.monotonic() - start
        try:
            yield self.modules
        finally:
            slices.clear()
            replace_weights(inner, lambda _, tensor: torch.empty_like(tensor, device="meta"))

    def _is_held(self, name: str, weight: Tensor) -> bool:
        """Return whether training divides this weight as generation does."""
        own, held = self._partitions.get(name), slice_of(weight)
        is_same_group = sharding_of(self._model).tensor_size == self.group.size
        return (
            is_same_group
            and own is not None
            and held is not None
            and held.all_pieces is not None
            and (own.dim, own.pieces, own.num_zeros) == (held.dim, held.pieces, 0)
        )

    def _cut(self, name: str, weight: Tensor, *, is_slice: bool) -> Tensor:
        own = None if is_slice else self._partitions.get(name)
        return (weight.clone() if own is None else own.of(weight)).to(self._device)


def _expect_equal_ends(model: PreTrainedModel) -> None:
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if head.weight.shape[0] != embedding.num_embeddings:
        raise ConfigError(
            f"{type(model).__name__} reads {embedding.num_embeddings} tokens and speaks {head.weight.shape[0]}: it "
            "cannot be divided by its vocabulary",
            hint=f"set {GENERATION}=1",
        )


def _make_layers_narrow(
    model: PreTrainedModel, partitions: Mapping[str, Partition], group: TensorGroup
) -> None:
    """Row layers put out the group's sum."""
    expect_narrower_output(model, partitions)
    rows = PLANS[model.config.model_type].rows
    for path, layer in model.named_modules():
        if path.rpartition(".")[2] in rows:
            layer.register_forward_hook(lambda _, __, output: group.sum(output))


def _look_up_together(model: PreTrainedModel, place: Place, group: TensorGroup) -> None:
    embedding: Any = model.get_input_embeddings()
    first, rows, _ = place.vocabulary(embedding.num_embeddings)
    embedding.padding_idx = None  # matters to gradients alone, and would have to be a row that is here
    embedding.forward = partial(look_up, embedding, first, rows, group.sum)
