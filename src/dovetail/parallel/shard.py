"""One model's weights over the processes: replicated, or sharded with FSDP2.

Responsible for: the ZeRO stages (Rajbhandari et al. 2019, arXiv:1910.02054), when gradients are reduced, and the two
other layouts of a sharded model: whole on every device to generate with, whole in one process's host memory to save.
Not responsible for: gradient steps (training/step.py), optimiser states, which follow the parameters
(training/optim.py), checkpoints of shards (runs/checkpoint.py).

Stages, in terms of FSDP2, which always shards parameters, gradients and optimiser states at rest:
  0  nothing is sharded: whole replicas, gradients summed once per step
  1  parameters stay gathered from forward to backward; gradients are accumulated whole and reduced once per step
  2  the same, with gradients reduced after each micro-batch: less memory, more communication
  3  parameters are resharded after each layer, and gathered again for its backward pass
Groups of neighbours may hold a copy each (hybrid sharding, Zhao et al. 2023, arXiv:2304.11277): they shard it among
themselves, and gradients are summed over the groups once per step.
"""

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

from dovetail.errors import ConfigError, ModelError
from dovetail.model.copies import copy_of
from dovetail.model.forward import plain_model
from dovetail.model.shards import whole
from dovetail.parallel.grid import Grid
from dovetail.parallel.shards_in_place import compute_on_shards
from dovetail.parallel.tensor_training import TensorParallel, make_tensor_parallel, sum_in_pieces
from dovetail.parallel.world import ALONE, World

R = TypeVar("R")

_LAYOUT = "dovetail_layout"
"""The attribute of a plain model that holds its placement."""


@dataclass(slots=True, eq=False)
class Layout:
    """The placement of one model's weights over the processes."""

    world: World = ALONE
    stage: int = 0
    skeleton: nn.Module | None = None
    """The model before sharding, on the meta device; None if the model is whole on each rank."""
    offloads: bool = False
    """True if shards are in host memory."""
    shard_size: int = 1
    """The number of ranks that shard one copy: all of them, or groups of neighbours with a copy each."""
    tensor_parallel: TensorParallel | None = None
    """The tensor parallelism of the layers, which comes before sharding; None if each layer is in one process."""
    gather_seconds: float = 0.0
    """The time spent on gathering the whole model since the last `take_costs`."""
    gather_bytes: int = 0
    """The bytes that this rank received for it."""
    _depth: int = field(default=0)

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """Become None in a copy or a pickle of the model, which is a model of its own and not sharded."""
        return type(None), ()

    @property
    def is_sharded(self) -> bool:
        return self.stage > 0

    @property
    def num_replicas(self) -> int:
        """The number of ranks that hold a copy of the same shard of the model."""
        return self.world.size // self.shard_size

    @property
    def computes_on_shards(self) -> bool:
        """Return whether FSDP2 computes with the shards: one process holds all rows, and nothing needs to be freed."""
        return self.is_sharded and self.world.size == 1 and not self.offloads

    @property
    def reshards_layers(self) -> bool:
        """Return whether weights are resharded after each layer's forward pass."""
        return self.stage == 3 and not self.computes_on_shards

    def take_costs(self) -> tuple[float, int]:
        """Return (seconds, bytes received) of gathering since the last call, and start counting anew."""
        costs = self.gather_seconds, self.gather_bytes
        self.gather_seconds, self.gather_bytes = 0.0, 0
        return costs


@dataclass(frozen=True, slots=True, eq=False)
class ShardedModel:
    """A model, plain or peft-wrapped, with the placement of its weights: whole on one device, or over processes."""

    model: Any
    layout: Layout

    @property
    def world(self) -> World:
        """The processes that hold the model together."""
        return self.layout.world

    @property
    def generation_model(self) -> Any:
        """The model that generates: the model itself, or the one that `unsharded` fills."""
        return self.layout.skeleton or self.model

    @property
    def tensor_size(self) -> int:
        """The number of ranks that compute each layer together."""
        return 1 if self.layout.tensor_parallel is None else self.layout.tensor_parallel.group.size

    def before_backward(self, *, is_last: bool) -> None:
        """Prepare FSDP2 for the next micro-batch; call it before each forward pass. is_last: it is the step's last."""
        layout, inner = self.layout, plain_model(self.model)
        if isinstance(inner, FSDPModule):
            inner.set_is_last_backward(is_last)
            if layout.stage == 1 and not layout.computes_on_shards:
                inner.set_requires_gradient_sync(is_last)
                inner.set_reshard_after_backward(is_last)
            elif layout.num_replicas > 1:
                inner.set_requires_all_reduce(is_last)

    def before_update(self) -> None:
        """Reshard before an update, which gathered copies would not see; call it after the last backward pass."""
        if not self.layout.computes_on_shards:
            self.reshard()

    def reduce_gradients(self, gradients: Mapping[str, Tensor]) -> None:
        """All-reduce the gradients of replicas in place; those of shards are reduced already.

        Weights that tensor parallelism leaves whole get the same gradient on all ranks that hold them.
        """
        if not self.layout.is_sharded and self.world.size > 1:
            sum_in_pieces(self.world.sum, list(gradients.values()))
        if self.layout.tensor_parallel is not None:
            self.layout.tensor_parallel.complete(gradients)

    def counted_elsewhere(self) -> frozenset[str]:
        """Return the weights whose part of the gradient norm another rank counts, which holds them whole as well."""
        return (
            frozenset()
            if self.layout.tensor_parallel is None
            else self.layout.tensor_parallel.counted_elsewhere()
        )

    def whole_norm(self, norm: Tensor) -> Tensor:
        """Return the gradient norm over those that compute each layer together, from the norm of what each counts."""
        return norm if self.layout.tensor_parallel is None else self.layout.tensor_parallel.whole_norm(norm)

    def reshard(self) -> None:
        """Free the gathered weights that a forward pass left, so that the model's parameters are shards again."""
        inner = plain_model(self.model)
        if isinstance(inner, FSDPModule):
            for module in inner.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()

    @contextmanager
    def resharded_after_use(self) -> Iterator[None]:
        """Reshard after each forward pass within the block, so that the model's parameters are shards there."""
        inner = plain_model(self.model)
        if not isinstance(inner, FSDPModule):
            yield
            return
        self.reshard()
        inner.set_reshard_after_forward(True)
        try:
            yield
        finally:
            inner.set_reshard_after_forward(self.layout.reshards_layers)

    @contextmanager
    def unsharded(self) -> Iterator[Any]:
        """Provide a plain model with the whole weights as they are now, on the device; it must not be trained.

        It is the model itself if that is not sharded. Blocks may be nested; the outermost gathers the weights.
        """
        layout = self.layout
        if layout.skeleton is None:
            yield self.model
            return
        if layout._depth == 0:
            self._fill(layout.skeleton)
        layout._depth += 1
        try:
            yield layout.skeleton
        finally:
            layout._depth -= 1
            if layout._depth == 0:
                replace_weights(layout.skeleton, lambda _, tensor: torch.empty_like(tensor, device="meta"))

    def _fill(self, skeleton: nn.Module) -> None:
        start = time.monotonic()
        self.reshard()
        tensors = {
            name: weight
            if self.layout.computes_on_shards
            else weight.clone()  # one that was gathered is there until the next
            for name, weight in self.whole_weights()
        }
        replace_weights(skeleton, lambda name, _: tensors[name])
        for device in {tensor.device for tensor in tensors.values() if tensor.is_cuda}:
            torch.cuda.synchronize(device)  # once per generate phase, so that the seconds are true
        self.layout.gather_seconds += time.monotonic() - start

    def for_saving(self, weights: Mapping[str, Tensor] | None = None) -> Any | None:
        """Return a plain model to save on the first rank, None on the others. A collective: one weight after another is
        gathered and moved to the host.

        weights: name -> tensor that takes the place of the model's own, whole or sharded as that is; the result is then
        a float32 copy. Without them, and if nothing is sharded, the result is the model itself.
        """
        layout = self.layout
        if layout.skeleton is None and weights is None:
            return self.model if self.world.is_first else None
        self.reshard()
        host = torch.device("cpu")
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.model.named_parameters():
            full = self._joined(whole((weights or {}).get(name, parameter)), parameter)
            if self.world.is_first:
                tensors[name] = full.to(host, torch.float32 if weights is not None else None, copy=True)
        if not self.world.is_first:
            return None
        made: Any = copy_of(self.generation_model, device=torch.device("meta"))
        share_buffers(self.model, made)
        replace_weights(made, lambda name, _: tensors[name])
        made.to(host)
        return made if weights is None else nn.Module.float(made)

    def whole_weights(self, slices: Collection[str] = ()) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, whole weight) for each weight, gathering one layer at a time.

        A collective if the model is sharded or divided; its bytes are counted. Call `reshard` before. A weight is valid
        until the next one is asked for. slices: names of weights that are wanted as this rank's slice.
        """
        layout, held = self.layout, dict(self.model.named_parameters())
        for module, names in _names_by_group(self.model).items():
            if isinstance(module, FSDPModule):
                module.unshard()
            for name in names:
                weight = self.model.get_parameter(name).detach()
                if layout.is_sharded:
                    num_bytes = weight.numel() * weight.element_size()
                    layout.gather_bytes += num_bytes - num_bytes // layout.shard_size
                full = weight if name in slices else self._joined(weight, held[name])
                layout.gather_bytes += (full.numel() - weight.numel()) * full.element_size()
                yield name, full
            if isinstance(module, FSDPModule):
                module.reshard()

    def _joined(self, tensor: Tensor, like: Tensor) -> Tensor:
        return (
            tensor if self.layout.tensor_parallel is None else self.layout.tensor_parallel.whole(tensor, like)
        )


def sharding_of(model: Any) -> ShardedModel:
    """Return the model with its placement: whole on one device unless `shard_model` was called with this very model."""
    layout: Layout | None = getattr(plain_model(model), _LAYOUT, None)
    return ShardedModel(model, layout or Layout())


def shard_model(
    model: Any,
    *,
    stage: int,
    world: World,
    device: torch.device,
    shard_size: int | None = None,
    offload: bool = False,
) -> None:
    """Shard the model in place over the processes of `world`, at a ZeRO stage, on their devices.

    shard_size: how many neighbours share one copy; it divides their number. None: all.
    offload: shards live in host memory.
    In a grid (grid.py) neighbours compute each layer together, and the ranks of a column shard what each holds.
    Call it with the same weights in each process, before the optimiser is made. Without a group it does nothing.
    Raises ConfigError if what is to be offloaded is not sharded.
    """
    if offload and (stage == 0 or not world.is_group):
        raise ConfigError(
            "a model can stay in host memory only if it is sharded: "
            + ("its ZeRO stage is 0" if world.is_group else "this process is not one of a group"),
            hint="set its stage in zero_stage to 1, 2 or 3, and start the processes, if only one, with torchrun",
        )
    if not world.is_group:
        return
    inner: Any = plain_model(model)
    group = world.tensor if isinstance(world, Grid) else None
    skeleton = None if stage == 0 and group is None else copy_of(model, device=torch.device("meta"))
    size = world.size if isinstance(world, Grid) else shard_size or world.size
    tensor_parallel = None if group is None else make_tensor_parallel(model, group)
    layout = Layout(
        world, stage, skeleton, offloads=offload, shard_size=size, tensor_parallel=tensor_parallel
    )
    _shard(model, layout, device)
    _mark(model, layout)
    if skeleton is not None:
        share_buffers(model, skeleton)
    setattr(inner, _LAYOUT, layout)


def _shard(model: Any, layout: Layout, device: torch.device) -> None:
    """Shard with FSDP2; at stage 0 move the whole model to the device."""
    inner: Any = plain_model(model)
    if not layout.is_sharded:
        model.to(device)
        return
    inner.run_with_weights = MethodType(_run, inner)
    # Sums, because losses are divided by the count of all processes already; float32 on the way, as in one process.
    options: dict[str, Any] = {
        "mesh": layout.world.mesh(device, layout.shard_size),
        "reshard_after_forward": layout.reshards_layers,
        "mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False),
    }
    if layout.offloads:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=device.type != "cpu")
    for module in [inner] if layout.computes_on_shards else [*_layers(inner), inner]:
        sharded = fully_shard(module, **options)
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)
    register_fsdp_forward_method(inner, "run_with_weights")
    if layout.computes_on_shards:
        compute_on_shards(model)
        # Nothing frees the shards, so the model may use them as its weights at any time.
        _mark(model, layout)
        sharding_of(model).reshard()
        inner.set_reshard_after_backward(False)


def _mark(model: nn.Module, layout: Layout) -> None:
    if layout.tensor_parallel is not None:
        layout.tensor_parallel.mark(model, is_sharded=layout.is_sharded, is_first=layout.world.rank == 0)


def _run(_: nn.Module, function: Callable[[], R]) -> R:
    """Call the function as a method of the sharded model, around which FSDP2 gathers the root's weights."""
    return function()


def _layers(inner: Any) -> list[nn.Module]:
    """Return the decoder's layers, the units of gathering. Raises ModelError if they are not found."""
    num_layers = inner.config.get_text_config().num_hidden_layers
    for module in inner.modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            return list(module)
    raise ModelError(
        f"{type(inner).__name__}: no list of {num_layers} modules, which its num_hidden_layers says there is",
        hint="a model whose layers are not found cannot be sharded: set all of zero_stage to 0",
    )


def share_buffers(model: nn.Module, skeleton: nn.Module) -> None:
    """Give the skeleton the buffers of the model, which are no weights."""
    modules = dict(skeleton.named_modules())
    for name, module in model.named_modules():
        for key, buffer in module._buffers.items():
            modules[name]._buffers[key] = buffer


def _names_by_group(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Group the names of the weights by the FSDP2 module that gathers them."""
    owners: dict[str, nn.Module] = {name: model for name, _ in model.named_parameters()}
    modules: dict[str, Any] = dict(model.named_modules())
    for path, module in modules.items():
        if isinstance(module, FSDPModule):  # those further in come later
            owner = modules[path]
            owners |= {name: owner for name, _ in owner.named_parameters(path) if name in owners}
    groups: dict[nn.Module, list[str]] = {}
    for name, module in owners.items():
        groups.setdefault(module, []).append(name)
    return groups


def replace_weights(model: nn.Module, tensor_of: Callable[[str, Tensor], Tensor]) -> None:
    """Replace all parameters by other tensors; tied ones stay tied."""
    made: dict[int, nn.Parameter] = {}
    for name, module in model.named_modules():
        for key, old in module._parameters.items():
            if old is None:
                continue
            if id(old) not in made:
                tensor = tensor_of(f"{name}.{key}" if name else key, old)
                made[id(old)] = nn.Parameter(tensor, requires_grad=False)
            module._parameters[key] = made[id(old)]
