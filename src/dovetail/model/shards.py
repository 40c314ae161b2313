"""Tensors of which this process may hold a shard: some of the rows.

Responsible for: the local rows, the whole, and writing to either; for tensors that are not sharded, the tensor itself.
Not responsible for: sharding a model, or keeping it in host memory (parallel/shard.py).

A shard is a DTensor split by rows as `torch.chunk` does, over one dimension of a mesh: FSDP2 makes
them of parameters. Over another dimension there are replicas: processes with the same rows. A shard is offloaded where
the mesh is of devices and the rows are in host memory: they are copied to the device for computing.
"""

from typing import Any

import torch
from torch import Tensor, nn


def is_shard(tensor: Tensor) -> bool:
    """Return whether the tensor is sharded, so that this process holds some of its rows."""
    return hasattr(tensor, "to_local")


def is_offloaded(tensor: Tensor) -> bool:
    """Return whether the rows are in host memory while a device computes with them."""
    held: Any = tensor
    return is_shard(tensor) and tensor.device.type != held.device_mesh.device_type


def computing_device(model: nn.Module) -> torch.device:
    """Return the device that the model computes on; offloaded weights are elsewhere."""
    weight: Any = next(model.parameters())
    return torch.device(weight.device_mesh.device_type) if is_offloaded(weight) else weight.device


def local(tensor: Tensor) -> Tensor:
    """Return the local rows, sharing their memory; without gradient."""
    held: Any = tensor.detach()
    rows: Tensor = held.to_local() if is_shard(held) else held
    return rows


def whole(tensor: Tensor) -> Tensor:
    """Return all rows, on the computing device. A collective if the tensor is sharded."""
    held: Any = tensor.detach()
    if is_offloaded(held):
        held = shard_like(held, local(held).to(held.device_mesh.device_type))
    rows: Tensor = held.full_tensor() if is_shard(held) else held
    return rows


def bounds(tensor: Tensor) -> tuple[int, int]:
    """Return the first local row, and the one after the last."""
    if not is_shard(tensor):
        return 0, len(tensor)
    sharded: Any = tensor
    mesh = sharded.device_mesh
    split = next(axis for axis, placement in enumerate(sharded.placements) if placement.is_shard())
    num_rows = tensor.shape[0]
    per_rank = -(-num_rows // mesh.size(split))
    start = min(mesh.get_local_rank(split) * per_rank, num_rows)
    return start, min(start + per_rank, num_rows)


def is_first_replica(tensor: Tensor) -> bool:
    """Return whether this process is the first of those that hold the same rows of a shard."""
    sharded: Any = tensor
    places = zip(sharded.device_mesh.get_coordinate(), sharded.placements, strict=True)
    return all(place == 0 for place, placement in places if not placement.is_shard())


@torch.no_grad()
def assign(target: Tensor, value: Tensor) -> None:
    """Overwrite `target` with `value`, a shard of the same rows or a whole tensor."""
    if is_shard(target) and not is_shard(value):
        start, end = bounds(target)
        value = value[start:end]
    local(target).copy_(local(value))


def shard_like(tensor: Tensor, rows: Tensor) -> Tensor:
    """Return `rows` as the local rows of a tensor that is sharded as `tensor` is; `rows` itself if it is not."""
    if not is_shard(tensor):
        return rows
    from torch.distributed.tensor import DTensor  # only where there is a group
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    # FSDP2 makes its own in this way. `DTensor.from_local` would copy rows of host memory to the device of the mesh.
    make: Any = DTensor
    sharded: Any = tensor
    meta = TensorMeta(sharded.shape, sharded.stride(), rows.dtype)
    spec = DTensorSpec(sharded.device_mesh, sharded.placements, tensor_meta=meta)
    made: Tensor = make(rows.detach(), spec, requires_grad=False)
    return made
