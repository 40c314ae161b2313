"""A model divided over a tensor-parallel group of processes to train (Shoeybi et al. 2019, arXiv:1909.08053).

Responsible for: the modules of one process, narrowed in place with its slices as parameters; the two sums over the
group in each forward and backward pass; gradients of whole weights that are the same in all processes.
Not responsible for: the group and its collectives (world.py, grid.py), which part of which weight (tensor_plan.py),
modules that generate (tensor.py), shards of the slices (shard.py). A model that is alone never comes here.

What a column layer takes in is whole in every process, and so is what a row layer puts out, once it is summed ("f" and
"g" of the paper): forward, row layers' results are summed; backward, the gradients of what column layers took in. A row
layer's bias is whole and added after the sum. Embedding and head are cut by the vocabulary where it comes out even:
what is looked up is summed, and of logits their maxima and sums alone are shared (model/linear_logprobs.py).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dovetail.model.forward import plain_model
from dovetail.model.slices import Slice, note, slice_of
from dovetail.parallel.narrow import count_fewer_heads, expect_narrower_output, look_up
from dovetail.parallel.tensor_plan import (
    PLANS,
    TRAINING,
    Partition,
    Place,
    base_of,
    expect_divisible,
    is_cut_evenly,
    partial_gradients,
    training_partitions,
)
from dovetail.parallel.world import TensorGroup

BUCKET_ELEMENTS = 1 << 24
"""Gradients are sent in pieces of about this many numbers: large enough for the network's full speed."""


@dataclass(frozen=True, slots=True, eq=False)
class TensorParallel:
    """The slices of a model's weights over a tensor-parallel group. Names are those of the model's parameters."""

    group: TensorGroup
    slices: Mapping[str, Slice]
    """The slice of each parameter."""
    partial: frozenset[str]
    """Whole weights whose gradient is to be summed over the group."""

    def mark(self, model: nn.Module, *, is_sharded: bool, is_first: bool) -> None:
        """Note on every parameter which part of the whole it is.

        is_first: this process is the first of those with the same slices; of shards of them, each has its own.
        """
        for name, parameter in model.named_parameters():
            found = self.slices[name]
            is_only = found.all_pieces is not None or self.group.is_first
            writes = is_only and (is_sharded or is_first)
            note(parameter, Slice(found.shape, found.dim, found.pieces, found.all_pieces, writes))

    def whole(self, tensor: Tensor, like: Tensor) -> Tensor:
        """Return the whole that `tensor` is a slice of, cut as `like` is. A collective where it is cut."""
        found = slice_of(like)
        if found is None or found.all_pieces is None:
            return tensor
        return found.joined(self.group.each(tensor))

    def counted_elsewhere(self) -> frozenset[str]:
        """Return the weights whose part of the gradient norm another rank of the group counts."""
        if self.group.is_first:
            return frozenset()
        return frozenset(name for name, found in self.slices.items() if found.all_pieces is None)

    def whole_norm(self, norm: Tensor) -> Tensor:
        """Return the gradient norm over the group, from the norm of what each rank counts."""
        return self.group.sum(norm**2).sqrt()

    def complete(self, gradients: Mapping[str, Tensor]) -> None:
        """Make the gradients of whole weights those of the whole model, in place, equal to the bit on all ranks.

        Call it once per step. A gradient that every rank computed alike is taken from the first rank, because kernels
        that add in no fixed order would let replicas drift apart.
        """
        whole = [name for name in gradients if self.slices[name].all_pieces is None]
        sum_in_pieces(self.group.sum, [gradients[name] for name in whole if name in self.partial])
        in_pieces(self.group.from_first, [gradients[name] for name in whole if name not in self.partial])


def make_tensor_parallel(model: Any, group: TensorGroup) -> TensorParallel:
    """Make the model's layers this process's part of them, in place; plain or peft-wrapped, with any head.

    Call it with the same weights in each process. Raises ConfigError if the group's size does not divide the model.
    """
    inner = plain_model(model)
    expect_divisible(inner.config, group.size, setting=TRAINING, model=type(inner).__name__)
    place = Place(group.rank, group.size)
    partitions = [training_partitions(inner, Place(rank, group.size)) for rank in range(group.size)]
    slices = {id(p): _slice_of(name, p, partitions, group) for name, p in inner.named_parameters()}
    partial_ids = {id(inner.get_parameter(name)) for name in partial_gradients(inner)}
    named = dict(model.named_parameters())
    tensor_parallel = TensorParallel(
        group,
        {name: slices[id(parameter)] for name, parameter in named.items()},
        frozenset(name for name, parameter in named.items() if id(parameter) in partial_ids),
    )
    _connect(inner, group)
    _share_vocabulary(inner, place, group)
    _cut(inner, partitions[group.rank])
    expect_narrower_output(inner, partitions[group.rank])
    count_fewer_heads(inner, place)
    return tensor_parallel


def sum_in_pieces(add_up: Callable[[Tensor], Tensor], tensors: Sequence[Tensor]) -> None:
    """Sum many tensors at a time over the ranks, in place; they are rounded once, after the sum."""
    in_pieces(lambda flat: add_up(flat.to(torch.promote_types(flat.dtype, torch.float32))), tensors)


def in_pieces(send: Callable[[Tensor], Tensor], tensors: Sequence[Tensor]) -> None:
    """Replace the tensors by what `send` returns for them, many at a time, end to end."""
    for bucket in _buckets(tensors):
        flat = send(torch.cat([tensor.flatten() for tensor in bucket]))
        pieces = flat.split_with_sizes([tensor.numel() for tensor in bucket])
        for tensor, piece in zip(bucket, pieces, strict=True):
            tensor.copy_(piece.view_as(tensor))


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    for tensor in tensors:
        num = sum(held.numel() for held in bucket) + tensor.numel()
        if bucket and (tensor.dtype != bucket[0].dtype or num > BUCKET_ELEMENTS):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


def _slice_of(
    name: str, parameter: Tensor, partitions: Sequence[Mapping[str, Partition]], group: TensorGroup
) -> Slice:
    own = partitions[group.rank].get(name)
    if own is None:
        return Slice(parameter.shape, 0, ((0, len(parameter)),), None, is_first=group.is_first)
    all_pieces = tuple(theirs[name].pieces for theirs in partitions)
    return Slice(parameter.shape, own.dim, own.pieces, all_pieces, is_first=True)


@torch.no_grad()
def _cut(model: PreTrainedModel, partitions: Mapping[str, Partition]) -> None:
    made: dict[int, nn.Parameter] = {}
    for name, own in partitions.items():
        path, _, key = name.rpartition(".")
        module = model.get_submodule(path)
        weight = module._parameters[key]
        assert weight is not None
        if id(weight) not in made:  # tied ones stay tied
            made[id(weight)] = nn.Parameter(own.of(weight), requires_grad=weight.requires_grad)
        module._parameters[key] = made[id(weight)]


def _connect(model: PreTrainedModel, group: TensorGroup) -> None:
    """Attach hooks so that column layers read, and row layers return, what is equal on all ranks."""
    plan = PLANS[model.config.model_type]
    readers: dict[str, list[nn.Module]] = {}
    for path, layer in model.named_modules():
        parent, _, name = path.rpartition(".")
        if name in plan.columns:
            readers.setdefault(parent, []).append(layer)
        elif name in plan.rows:
            _put_out_sum(layer, group)
    for layers in readers.values():
        shared = _SharedInput(group, len(layers))
        for layer in layers:
            layer.register_forward_pre_hook(shared)


def _share_vocabulary(model: PreTrainedModel, place: Place, group: TensorGroup) -> None:
    """Tell embedding and head which rows they hold; call it while they are whole."""
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if is_cut_evenly(embedding, group.size):
        first, rows = place.even(0, len(embedding.weight))
        padding = embedding.padding_idx
        is_here = padding is not None and first <= padding < first + rows
        embedding.padding_idx = padding - first if is_here else None
        embedding.forward = partial(look_up, embedding, first, rows, partial(_added_up, group))
    if head is not None and is_cut_evenly(head, group.size):
        head.shared_vocabulary = _Rows(group, place.even(0, len(head.weight))[0])
        head.forward = partial(_all_logits, head.forward, group)


def _all_logits(forward: Callable[[Tensor], Tensor], group: TensorGroup, hidden: Tensor) -> Tensor:
    """Return the logits of the whole head, without gradient; training never asks for them."""
    own = forward(hidden)
    assert not own.requires_grad, "logits of a divided head are not differentiable"
    return torch.cat(group.each(own), dim=-1)


@dataclass(frozen=True, slots=True)
class _Rows:
    """A `SharedVocabulary`: the head's rows of one process of a group."""

    group: TensorGroup
    first: int

    def copied(self, hidden: Tensor) -> Tensor:
        if not (torch.is_grad_enabled() and hidden.requires_grad):
            return hidden
        taken: Tensor = _Copied.apply(hidden, self.group)  # type: ignore[no-untyped-call]
        return taken

    def sum(self, tensor: Tensor) -> Tensor:
        return self.group.sum(tensor)

    def max(self, tensor: Tensor) -> Tensor:
        return self.group.max(tensor)


class _SharedInput:
    """The input that the column layers of one module share, whose gradient is all-reduced once for all of them."""

    def __init__(self, group: TensorGroup, num_readers: int) -> None:
        self._group = group
        self._num_readers = num_readers
        self._forget()

    def _forget(self) -> None:
        self._given: Tensor | None = None
        self._taken: Tensor | None = None
        self._num_left = self._num_readers

    def __call__(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        (given,) = inputs
        if not (torch.is_grad_enabled() and given.requires_grad):
            return inputs
        if given is not self._given:
            self._forget()
            self._given, self._taken = given, _Copied.apply(given, self._group)  # type: ignore[no-untyped-call]
        taken = self._taken
        assert taken is not None
        self._num_left -= 1
        if self._num_left == 0:
            self._forget()  # or the activations of a whole pass would live on
        return (taken,)


def _put_out_sum(layer: nn.Module, group: TensorGroup) -> None:
    base: Any = base_of(layer)
    if isinstance(base, Conv1D):
        base.forward = partial(_product, base)  # type: ignore[method-assign]
    layer.forward = partial(_summed, base, layer.forward, group)


def _summed(
    base: nn.Module, forward: Callable[..., Tensor], group: TensorGroup, *args: Any, **kwargs: Any
) -> Tensor:
    """Return a row layer's output: the sum over the group, with the bias added once."""
    bias = base._parameters["bias"]
    vars(base)["bias"] = None  # hides the parameter from the layer's own forward
    try:
        part = forward(*args, **kwargs)
    finally:
        del vars(base)["bias"]
    total = _added_up(group, part)
    return total if bias is None else total + bias


def _added_up(group: TensorGroup, part: Tensor) -> Tensor:
    """Sum the partial outputs over the group: in place, unless a backward pass needs them."""
    if not part.requires_grad:
        return group.sum(part)
    total: Tensor = _Summed.apply(part, group)  # type: ignore[no-untyped-call]
    return total


def _product(layer: Conv1D, x: Tensor) -> Tensor:
    """Compute Conv1D's product without its bias, which its own forward cannot leave out."""
    return x @ layer.weight


class _Copied(torch.autograd.Function):
    """The paper's f: the identity forward, an all-reduce of the gradient backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: TensorGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.group.sum(grads[0].clone(memory_format=torch.contiguous_format)), None


class _Summed(torch.autograd.Function):
    """The paper's g: an all-reduce forward, the identity backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: TensorGroup) -> Tensor:
        return group.sum(x.clone(memory_format=torch.contiguous_format))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None
