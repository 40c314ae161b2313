"""One model's weights over the processes: replicated, or sharded with FSDP2.

Responsible for: the ZeRO stages (Rajbhandari et al. 2019, arXiv:1910.02054), when gradients are reduced, and the two
other layouts of a sharded model: whole on every device to generate with, whole in one process's host memory to save.
Not responsible for: gradient steps (training/step.py), optimiser states, which follow the parameters
(training/optim.py), checkpoints of shards (training/checkpoint.py).

Stages, in terms of FSDP2, which always shards parameters, gradients and optimiser states at rest:
  0  nothing is sharded: whole replicas, gradients summed once per step
  1  parameters stay gathered from forward to backward; gradients are accumulated whole and reduced once per step
  2  the same, with gradients reduced after each micro-batch: less memory, more communication
  3  parameters are given back after each layer, and gathered again for its backward pass
Groups of neighbours may hold a copy each (hybrid sharding, Zhao et al. 2023, arXiv:2304.11277): they shard it among
themselves, and gradients are summed over the groups once per step.
"""

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MethodType
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

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
from dovetail.model.shards import is_offloaded, local, whole
from dovetail.parallel.grid import Grid
from dovetail.parallel.lending import lend_shards
from dovetail.parallel.tensor_group import WHOLE
from dovetail.parallel.tensor_training import Division, divide, sum_in_pieces
from dovetail.parallel.world import ALONE, World

R = TypeVar("R")


@dataclass(slots=True, eq=False)
class Layout:
    """How a model's weights lie on the processes."""

    world: World = ALONE
    stage: int = 0
    skeleton: nn.Module | None = None
    """The model as it was before, without memory behind its weights; None if it is here whole."""
    offloads: bool = False
    """Shards are in host memory."""
    shard_size: int = 1
    """Processes that hold one copy together: all, or groups of neighbours with a copy each."""
    division: Division = field(default_factory=Division)
    """How each layer is divided over neighbours, before anything is sharded."""
    gather_seconds: float = 0.0
    """Spent on gathering the whole model, since last asked for."""
    gather_bytes: int = 0
    """Received by this process in doing so."""
    _depth: int = field(default=0)

    @property
    def is_sharded(self) -> bool:
        return self.stage > 0

    @property
    def num_replicas(self) -> int:
        """Processes that hold the same rows of a sharded model."""
        return self.world.size // self.shard_size

    @property
    def lends(self) -> bool:
        """One process, whose shards are whole: FSDP2 computes with them instead of copies, and nothing is to free."""
        return self.is_sharded and self.world.size == 1 and not self.offloads

    @property
    def regathers(self) -> bool:
        """Weights are given back after each layer's forward pass."""
        return self.stage == 3 and not self.lends

    def take_costs(self) -> tuple[float, int]:
        """(seconds, bytes received) of gathering since the last call."""
        costs = self.gather_seconds, self.gather_bytes
        self.gather_seconds, self.gather_bytes = 0.0, 0
        return costs


_LAYOUTS: WeakKeyDictionary[nn.Module, Layout] = WeakKeyDictionary()
_UNSHARED = Layout()


def layout_of(model: Any) -> Layout:
    """How the model lies; alone on its device unless `spread` was called."""
    return _LAYOUTS.get(plain_model(model), _UNSHARED)


def world_of(model: Any) -> World:
    """The processes that hold the model together."""
    return layout_of(model).world


def spread(
    model: Any,
    *,
    stage: int,
    world: World,
    device: torch.device,
    shard_size: int | None = None,
    offload: bool = False,
) -> None:
    """Let the processes of `world` hold the model together, at a ZeRO stage, on their devices; in place.

    shard_size: how many neighbours share one copy; it divides their number. None: all.
    offload: what is sharded lives in host memory.
    Of a grid (grid.py), neighbours compute each layer together and the others shard what each of them holds.
    Call it with the same weights in each process, before the optimiser is made. In a world without a group: nothing.
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
    group = world.tensor if isinstance(world, Grid) else WHOLE
    skeleton = copy_of(model, device=torch.device("meta")) if stage or group.size > 1 else None
    size = world.size if isinstance(world, Grid) else shard_size or world.size
    layout = Layout(world, stage, skeleton, offloads=offload, shard_size=size, division=divide(model, group))
    _shard(model, layout, device)
    _mark(model, layout)
    if skeleton is not None:
        share_buffers(model, skeleton)
    _LAYOUTS[inner] = layout


def _shard(model: Any, layout: Layout, device: torch.device) -> None:
    """With FSDP2, or whole on the device at stage 0."""
    inner: Any = plain_model(model)
    if not layout.is_sharded:
        model.to(device)
        return
    inner.run_with_weights = MethodType(_run, inner)
    # Sums, because losses are divided by the count of all processes already; float32 on the way, as in one process.
    options: dict[str, Any] = {
        "mesh": layout.world.mesh(device, layout.shard_size),
        "reshard_after_forward": layout.regathers,
        "mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False),
    }
    if layout.offloads:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=device.type != "cpu")
    for module in [inner] if layout.lends else [*_layers(inner), inner]:
        sharded = fully_shard(module, **options)
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)
    register_fsdp_forward_method(inner, "run_with_weights")
    if layout.lends:
        lend_shards(model)
        # As nobody frees them, these may be what the model calls its weights at any time.
        _mark(model, layout)
        give_back(model)
        inner.set_reshard_after_backward(False)


def before_backward(model: Any, *, is_last: bool) -> None:
    """To be called before the forward pass of each micro-batch of a step; `is_last`: of the last one."""
    layout, inner = layout_of(model), plain_model(model)
    if isinstance(inner, FSDPModule):
        inner.set_is_last_backward(is_last)
        if layout.stage == 1 and not layout.lends:
            inner.set_requires_gradient_sync(is_last)
            inner.set_reshard_after_backward(is_last)
        elif layout.num_replicas > 1:
            inner.set_requires_all_reduce(is_last)


def before_update(model: Any) -> None:
    """To be called between the last backward pass of a step and its update, which gathered copies would not see."""
    if not layout_of(model).lends:
        give_back(model)


def reduce_gradients(model: Any, gradients: Mapping[str, Tensor]) -> None:
    """Sum the gradients of replicas over the processes, in place; those of shards are reduced already. Those of
    weights that a divided layer leaves whole become the same in all processes that have them."""
    layout = layout_of(model)
    if not layout.is_sharded and layout.world.size > 1:
        sum_in_pieces(layout.world.sum, list(gradients.values()))
    layout.division.complete(gradients)


def gathered_bytes(model: Any) -> int:
    """What one forward and backward pass has on the device beside the shards: whole weights at stages 1 and 2, and at
    stage 1 whole gradients of several micro-batches, in float32. At stage 3 there is one layer at a time: nothing
    that counts."""
    layout = layout_of(model)
    if layout.lends or layout.stage not in (1, 2):
        return 0
    total = 0
    for parameter in model.parameters():
        gradient = 4 if layout.stage == 1 and parameter.requires_grad else 0
        here = 0 if is_offloaded(parameter) else local(parameter).numel()
        total += parameter.numel() * (parameter.element_size() + gradient) - here * parameter.element_size()
    return total


def give_back(model: Any) -> None:
    """Free gathered weights that a forward pass left: what the model calls its weights are shards again."""
    inner = plain_model(model)
    if isinstance(inner, FSDPModule):
        for module in inner.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


@contextmanager
def given_back_after_use(model: Any) -> Iterator[None]:
    """Within the block no forward pass leaves gathered weights behind: what the model calls its weights are shards."""
    layout, inner = layout_of(model), plain_model(model)
    if not isinstance(inner, FSDPModule):
        yield
        return
    give_back(model)
    inner.set_reshard_after_forward(True)
    try:
        yield
    finally:
        inner.set_reshard_after_forward(layout.regathers)


@contextmanager
def gathered(model: Any) -> Iterator[Any]:
    """Within the block: a plain model on the device with the weights as they are now, whole; not to be trained.

    The model itself if it is not sharded. Blocks may be nested; the weights are gathered by the outermost.
    """
    layout = layout_of(model)
    if layout.skeleton is None:
        yield model
        return
    if layout._depth == 0:
        _fill(model, layout)
    layout._depth += 1
    try:
        yield layout.skeleton
    finally:
        layout._depth -= 1
        if layout._depth == 0:
            replace_weights(layout.skeleton, lambda _, tensor: torch.empty_like(tensor, device="meta"))


def generation_model(model: Any) -> Any:
    """What generates: the model itself, or what `gathered` fills."""
    return layout_of(model).skeleton or model


def whole_model(model: Any, weights: Mapping[str, Tensor] | None = None) -> Any | None:
    """A plain model to save, in the first process; None in the others. A collective: one weight after another is
    gathered and goes to the host.

    weights: name -> what stands in the place of the model's own, whole or sharded as they are; the result is then a
    float32 copy. Without them, and if nothing is sharded: the model itself.
    """
    layout = layout_of(model)
    if layout.skeleton is None and weights is None:
        return model if layout.world.is_first else None
    give_back(model)
    host = torch.device("cpu")
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        full = layout.division.whole(whole((weights or {}).get(name, parameter)), parameter)
        if layout.world.is_first:
            tensors[name] = full.to(host, torch.float32 if weights is not None else None, copy=True)
    if not layout.world.is_first:
        return None
    made: Any = copy_of(layout.skeleton or model, device=torch.device("meta"))
    share_buffers(model, made)
    replace_weights(made, lambda name, _: tensors[name])
    made.to(host)
    return made if weights is None else nn.Module.float(made)


def _mark(model: nn.Module, layout: Layout) -> None:
    layout.division.mark(model, is_sharded=layout.is_sharded, is_first=layout.world.rank == 0)


def _run(_: nn.Module, function: Callable[[], R]) -> R:
    """Becomes a method of a sharded model; FSDP2 gathers its own weights around the call."""
    return function()


def _layers(inner: Any) -> list[nn.Module]:
    """The decoder's layers: what is gathered and given back together. Raises ModelError if they are not found."""
    num_layers = inner.config.get_text_config().num_hidden_layers
    for module in inner.modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            return list(module)
    raise ModelError(
        f"{type(inner).__name__}: no list of {num_layers} modules, which its num_hidden_layers says there is",
        hint="a model whose layers are not found cannot be sharded: set all of zero_stage to 0",
    )


def share_buffers(model: nn.Module, skeleton: nn.Module) -> None:
    """Buffers are no weights: both have the same."""
    modules = dict(skeleton.named_modules())
    for name, module in model.named_modules():
        for key, buffer in module._buffers.items():
            modules[name]._buffers[key] = buffer


def _fill(model: Any, layout: Layout) -> None:
    assert layout.skeleton is not None
    start = time.monotonic()
    give_back(model)
    tensors = {
        name: weight if layout.lends else weight.clone()  # one that was gathered is there until the next
        for name, weight in whole_weights(model)
    }
    replace_weights(layout.skeleton, lambda name, _: tensors[name])
    for device in {tensor.device for tensor in tensors.values() if tensor.is_cuda}:
        torch.cuda.synchronize(device)  # once per generate phase, so that the seconds are true
    layout.gather_seconds += time.monotonic() - start


def whole_weights(model: Any, slices: Collection[str] = ()) -> Iterator[tuple[str, Tensor]]:
    """(name, all of it) of one weight after the other. A collective if the model is sharded or divided, whose bytes are
    counted; `give_back` must be called before. What is gathered, one layer at a time, is valid until the next is asked
    for. slices: names of weights that are wanted as this process's slice of them.
    """
    layout, held = layout_of(model), dict(model.named_parameters())
    for module, names in _names_by_group(model).items():
        if isinstance(module, FSDPModule):
            module.unshard()
        for name in names:
            weight = model.get_parameter(name).detach()
            if layout.is_sharded:
                num_bytes = weight.numel() * weight.element_size()
                layout.gather_bytes += num_bytes - num_bytes // layout.shard_size
            full = weight if name in slices else layout.division.whole(weight, held[name])
            layout.gather_bytes += (full.numel() - weight.numel()) * full.element_size()
            yield name, full
        if isinstance(module, FSDPModule):
            module.reshard()


def _names_by_group(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Names of the weights that FSDP2 gathers together, by the module around them."""
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
    """Put other tensors in the place of all parameters; tied ones stay tied."""
    made: dict[int, nn.Parameter] = {}
    for name, module in model.named_modules():
        for key, old in module._parameters.items():
            if old is None:
                continue
            if id(old) not in made:
                tensor = tensor_of(f"{name}.{key}" if name else key, old)
                made[id(old)] = nn.Parameter(tensor, requires_grad=False)
            module._parameters[key] = made[id(old)]
