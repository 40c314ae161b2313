"""AdamW with float32 master weights, and the moving average of what it trains.

Responsible for: which weights decay, float32 copies of weights that compute in bf16 or fp16, accumulating their
gradients in float32, the update, an exponential moving average in float32, and all of that as a state that resumes bit
for bit.
Not responsible for: when to step, clipping, skipping, the learning rate (step.py), a model that has the average
(parallel/shard.py), saving one (model/save.py).

Why float32: bf16 has 8 bits of mantissa, so a weight of 1 cannot move by less than 0.004, and RLHF's updates are a
thousand times smaller. The masters move; the model's own weights are their rounded image. A step of the average is
smaller still, by (1 - decay): an average kept in bf16 never moves.
"""

import math
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw
from torch.utils.hooks import RemovableHandle

from dovetail.errors import CheckpointError, ModelError, TrainingStopped
from dovetail.model.placement import is_out_of_memory
from dovetail.model.shards import assign, is_offloaded, is_shard, local, shard_like
from dovetail.model.slices import noted
from dovetail.training.loss_scale import LossScaler
from dovetail.training.offload import OffloadableTensors
from dovetail.training.weights import trained_weights

if TYPE_CHECKING:
    from dovetail.training.adamw_kernel import OnePassAdamW

_LOW_PRECISION = (torch.bfloat16, torch.float16)
BUCKET_BYTES = 2**28
"""The bytes of gradients that are widened at a time."""


@dataclass(slots=True, eq=False)
class _Slot:
    """One trained parameter and what AdamW keeps of it: of a sharded one, for the rows that are here."""

    parameter: nn.Parameter
    weight: Tensor
    """The tensor that is updated: the float32 master, or the parameter's own memory."""
    step: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    has_master: bool
    master_gradient: Tensor | None = None
    """The gradient of the micro-batches so far, where there is a master: in the parameter's precision after one
    micro-batch, in float32 after several."""

    def gradient(self) -> Tensor | None:
        if self.has_master:
            return self.master_gradient
        return None if self.parameter.grad is None else local(self.parameter.grad)

    def take_gradient(self, parameter: Tensor) -> None:
        """Take the parameter's gradient when autograd has completed it, or add it in float32."""
        assert parameter.grad is not None
        if is_offloaded(parameter.grad):
            # The copy from the device may be on its way still; this stream is where FSDP2 has ordered it.
            torch.accelerator.current_stream().synchronize()
        if self.master_gradient is None:
            self.master_gradient = local(parameter.grad)
        elif self.master_gradient.dtype == torch.float32:
            self.master_gradient.add_(local(parameter.grad))
        else:
            self.master_gradient = self.master_gradient.float().add_(local(parameter.grad))
        parameter.grad = None


@dataclass(frozen=True, slots=True, eq=False)
class _Group:
    """Weights that are updated together."""

    slots: Sequence[_Slot]
    weight_decay: float
    one_pass: "OnePassAdamW | None"
    """The kernel for them, where there is one."""


class Optimizer:
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101, algorithm 2) over a model's trainable weights.

    All state is allocated here, so that no step can fail half-way for want of memory. Weight decay leaves out
    vectors (norms, biases) and the scalar head `score`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        learning_rate: float,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ) -> None:
        self.learning_rate = learning_rate
        self.skipped_in_a_row = 0
        """Steps left out since the last one taken; counted by training/step.py."""
        self._betas = betas
        self._eps = eps
        self._slots = {name: _slot_of(p) for name, p in model.named_parameters() if p.requires_grad}
        if not self._slots:
            raise ModelError(
                f"{type(model).__name__} has no trainable weights",
                hint="leave requires_grad on for the weights to be trained, or add LoRA adapters",
            )
        grouped: dict[Any, list[_Slot]] = {}
        for name, slot in self._slots.items():
            decay = weight_decay if _decays(name, slot.parameter) else 0.0
            grouped.setdefault((decay, slot.parameter.dtype, _suits_one_pass(slot)), []).append(slot)
        self._groups = [
            _Group(slots, decay, self._one_pass(slots) if one_pass else None)
            for (decay, _, one_pass), slots in grouped.items()
        ]
        self._offloaded = OffloadableTensors(
            [tensor for slot in self._slots.values() for tensor in _large(slot)]
        )
        hooks = [
            _on_gradient(slot.parameter, slot.take_gradient)
            for slot in self._slots.values()
            if slot.has_master
        ]
        # A later optimiser of the same model must find the gradients untouched.
        weakref.finalize(self, _remove, hooks).atexit = False
        # float32 adapters on an fp16 base get their gradients through fp16 activations
        is_fp16 = any(parameter.dtype == torch.float16 for parameter in model.parameters())
        self.scaler = LossScaler() if is_fp16 else None
        """Present when the model computes in fp16."""

    def set_learning_rate(self, learning_rate: float) -> None:
        """Set the rate of the coming steps."""
        self.learning_rate = learning_rate

    def zero_grad(self) -> None:
        """Forget and free all gradients."""
        for slot in self._slots.values():
            if slot.has_master:
                slot.master_gradient = None  # the parameter's own was taken away
            else:
                slot.parameter.grad = None

    def gradients(self) -> dict[str, Tensor]:
        """Name -> accumulated gradient, of the weights that have one; float32 once it is a sum of several."""
        found = ((name, slot.gradient()) for name, slot in self._slots.items())
        return {name: gradient for name, gradient in found if gradient is not None}

    def grad_norm(self, left_out: Collection[str] = ()) -> Tensor:
        """Scalar on the device: the 2-norm over all gradients of the model that are here, in float32 or better.

        left_out: names of weights that another process counts.
        """
        gradients = [gradient for name, gradient in self.gradients().items() if name not in left_out]
        if not gradients:
            return torch.zeros(())
        precision = torch.float64 if gradients[0].dtype == torch.float64 else torch.float32
        norm: Tensor = torch.linalg.vector_norm(
            torch.stack(torch._foreach_norm(gradients, 2, dtype=precision))
        )
        return norm

    def offload(self) -> None:
        """Keep masters and moments in host memory until `restore`; no step can be taken meanwhile."""
        self._offloaded.offload()

    def restore(self) -> None:
        """Masters and moments are back on the device, bit for bit."""
        self._offloaded.restore()

    @torch.no_grad()
    def step(self, scale: Tensor | None = None) -> None:
        """Update the weights that have a gradient; the model's own become the masters, rounded.

        scale: scalar on the device that multiplies all gradients first; NaN leaves everything as it is. On a GPU
        nothing waits for it.
        """
        assert not self._offloaded.is_offloaded, "a step while the optimiser is offloaded"
        for group in self._groups:
            if group.one_pass is None:
                self._update(group, scale)
                continue
            device = group.slots[0].weight.device
            group.one_pass.step(
                [slot.gradient() for slot in group.slots],
                scale=torch.ones((), device=device) if scale is None else scale.to(device, torch.float32),
                learning_rate=self.learning_rate,
                weight_decay=group.weight_decay,
            )

    def weights(self) -> dict[str, Tensor]:
        """Name -> the weight in full precision, the rows that are here: the master where there is one. References,
        not copies."""
        return {name: slot.weight.detach() for name, slot in self._slots.items()}

    def state_dict(self) -> dict[str, Any]:
        """Tensors (references, not copies) and plain values: masters, moments, counts; full-precision weights
        that have no master belong to the model's own state."""
        return {
            "parameters": {name: _state_of(slot) for name, slot in self._slots.items()},
            "learning_rate": self.learning_rate,
            "skipped_in_a_row": self.skipped_in_a_row,
            "scaler": self.scaler.state_dict() if self.scaler else None,
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`, bit for bit. Raises CheckpointError if it is of other weights."""
        saved: Mapping[str, Mapping[str, Tensor]] = state["parameters"]
        for name, slot in self._slots.items():
            for key, tensor in _state_of(slot).items():
                assign(tensor, _matching(saved, name, key, tensor))
        if len(saved) != len(self._slots):
            surplus = sorted(saved.keys() - self._slots.keys())
            raise _foreign(f"the checkpoint also trains {surplus[0]}, which this model does not")
        _write_images(self._slots.values())
        self.learning_rate = float(state["learning_rate"])
        self.skipped_in_a_row = int(state["skipped_in_a_row"])
        if self.scaler and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])

    def _one_pass(self, slots: Sequence[_Slot]) -> "OnePassAdamW":
        from dovetail.training.adamw_kernel import OnePassAdamW, WeightState  # Triton comes with CUDA alone

        states = [
            WeightState(
                weight=slot.weight,
                exp_avg=slot.exp_avg,
                exp_avg_sq=slot.exp_avg_sq,
                step=slot.step,
                image=local(slot.parameter) if slot.has_master else None,
            )
            for slot in slots
        ]
        return OnePassAdamW(states, betas=self._betas, eps=self._eps)

    def _update(self, group: "_Group", scale: Tensor | None) -> None:
        """torch's own kernel, after a look at the scale: one over all tensors, also on the CPU, where it is ten
        times as fast as one for each."""
        factor = 1.0 if scale is None else float(scale)
        if math.isnan(factor):
            return
        for slots in _buckets([slot for slot in group.slots if slot.gradient() is not None]):
            gradients = [
                gradient.to(slot.weight.dtype) for slot in slots if (gradient := slot.gradient()) is not None
            ]
            if factor != 1.0:
                torch._foreach_mul_(gradients, factor)
            adamw(
                [slot.weight for slot in slots],
                gradients,
                [slot.exp_avg for slot in slots],
                [slot.exp_avg_sq for slot in slots],
                [],
                [slot.step for slot in slots],
                fused=True,
                amsgrad=False,
                beta1=self._betas[0],
                beta2=self._betas[1],
                lr=self.learning_rate,
                weight_decay=group.weight_decay,
                eps=self._eps,
                maximize=False,
            )
            _write_images(slots)


def build_optimizer(
    model: nn.Module,
    *,
    learning_rate: float,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
) -> Optimizer:
    """`Optimizer`, with a clear error when its state does not fit. Raises ModelError if nothing is
    trainable."""
    settings: dict[str, Any] = {"weight_decay": weight_decay, "betas": betas, "eps": eps}
    try:
        return Optimizer(model, learning_rate=learning_rate, **settings)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        num_weights = sum(local(p).numel() for p in model.parameters() if p.requires_grad)
        raise TrainingStopped(
            f"the optimiser's state for the {num_weights:,} trained weights that are here, about "
            f"{num_weights * 12 / 2**30:.1f} GiB, does not fit in memory",
            hint="train LoRA adapters (actor.lora.rank=64), shard the model (zero_stage) over more devices, keep it "
            "in host memory (offload), or use a smaller model",
        ) from error


def _decays(name: str, parameter: Tensor) -> bool:
    """Return whether weight decay applies: to matrices other than the reward head, also within peft."""
    return parameter.ndim >= 2 and "score" not in name.split(".")


def _suits_one_pass(slot: _Slot) -> bool:
    """Return whether adamw_kernel.py can step: on a GPU, float32 state, plain tensors at addresses that 16 divides."""
    tensors = (slot.weight, local(slot.parameter))
    return (
        slot.weight.is_cuda
        and slot.weight.dtype == torch.float32
        and all(tensor.is_contiguous() and tensor.data_ptr() % 16 == 0 for tensor in tensors)
    )


def _buckets(slots: Iterable[_Slot]) -> Iterator[list[_Slot]]:
    """Neighbours whose float32 gradients, made for the update alone, fit in BUCKET_BYTES together."""
    bucket: list[_Slot] = []
    room = BUCKET_BYTES
    for slot in slots:
        needed = slot.weight.numel() * slot.weight.element_size()
        if bucket and needed > room:
            yield bucket
            bucket, room = [], BUCKET_BYTES
        bucket.append(slot)
        room -= needed
    if bucket:
        yield bucket


def _write_images(slots: Iterable[_Slot]) -> None:
    """Write the rounded masters into the model's own weights."""
    images, masters = [], []
    for slot in slots:
        if slot.has_master:
            images.append(local(slot.parameter))
            masters.append(slot.weight)
    if images:
        torch._foreach_copy_(images, masters)


def _slot_of(parameter: nn.Parameter) -> _Slot:
    has_master = parameter.dtype in _LOW_PRECISION
    rows = local(parameter) if is_shard(parameter) else parameter
    weight = rows.detach().float() if has_master else rows
    return _Slot(
        parameter=parameter,
        weight=weight,
        step=torch.zeros((), dtype=torch.float32, device=weight.device),
        exp_avg=torch.zeros_like(weight, requires_grad=False),
        exp_avg_sq=torch.zeros_like(weight, requires_grad=False),
        has_master=has_master,
    )


def _large(slot: _Slot) -> list[Tensor]:
    """Return the tensors that take the device's memory beside the model."""
    if is_offloaded(slot.parameter):
        return []
    return [slot.exp_avg, slot.exp_avg_sq, *([slot.weight] if slot.has_master else [])]


def _state_of(slot: _Slot) -> dict[str, Tensor]:
    of_weight = {"exp_avg": slot.exp_avg, "exp_avg_sq": slot.exp_avg_sq}
    of_weight |= {"master": slot.weight} if slot.has_master else {}
    like = slot.parameter
    return {"step": slot.step} | {k: noted(shard_like(like, rows), like) for k, rows in of_weight.items()}


def _matching(saved: Mapping[str, Mapping[str, Tensor]], name: str, key: str, tensor: Tensor) -> Tensor:
    found = saved[name].get(key) if name in saved else None
    if found is None:
        raise _foreign(f"the checkpoint has no {key} of {name}")
    if found.shape != tensor.shape:
        raise _foreign(f"{name} has shape {tuple(found.shape)} in the checkpoint, {tuple(tensor.shape)} here")
    return found


def _foreign(what: str) -> CheckpointError:
    return CheckpointError(
        f"optimiser state of another model: {what}",
        hint="resume with the model, adapters and precision of the run, or give another output_dir",
    )


def _on_gradient(parameter: nn.Parameter, take: Callable[[Tensor], None]) -> RemovableHandle:
    handle: RemovableHandle = parameter.register_post_accumulate_grad_hook(take)  # type: ignore[no-untyped-call]
    return handle


def _remove(hooks: Sequence[RemovableHandle]) -> None:
    for hook in hooks:
        hook.remove()


class Ema:
    """average <- decay * average + (1 - decay) * weight, for every trainable weight (the rows that are here).

    optimizer: where the full-precision weights are, if the model computes in bf16 or fp16.
    """

    def __init__(self, model: nn.Module, *, decay: float, optimizer: Optimizer | None = None) -> None:
        self.decay = decay
        self._weights = optimizer.weights if optimizer is not None else lambda: trained_weights(model)
        self._averages = {
            name: _full_precision(local(weight)).clone() for name, weight in self._weights().items()
        }
        self._parameters = {name: p for name, p in model.named_parameters() if name in self._averages}
        self._offloaded = OffloadableTensors(
            [self._averages[name] for name, p in self._parameters.items() if not is_offloaded(p)]
        )

    def offload(self) -> None:
        """Keep the averages in host memory until `restore`."""
        self._offloaded.offload()

    def restore(self) -> None:
        """Move the averages back to the device, bit for bit."""
        self._offloaded.restore()

    @torch.no_grad()
    def update(self) -> None:
        """Move the averages towards the weights as they are now."""
        assert not self._offloaded.is_offloaded, "an update while the average is offloaded"
        weights = [_full_precision(local(weight)) for weight in self._weights().values()]
        torch._foreach_lerp_(list(self._averages.values()), weights, 1.0 - self.decay)

    def averages(self) -> dict[str, Tensor]:
        """Name -> average, float32, sharded as the weight is: references, not copies."""
        return {
            name: noted(shard_like(parameter, self._averages[name]), parameter)
            for name, parameter in self._parameters.items()
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the float32 averages themselves, not copies."""
        return {"averages": self.averages()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`, bit for bit. Raises CheckpointError if it is of other weights."""
        saved: Mapping[str, Tensor] = state["averages"]
        if saved.keys() != self._averages.keys():
            different = sorted(saved.keys() ^ self._averages.keys())
            raise CheckpointError(
                f"moving average of another model: {different[0]} is on one side only",
                hint="resume with the model and adapters that the run began with",
            )
        for name, average in self._averages.items():
            assign(shard_like(self._parameters[name], average), saved[name])


def _full_precision(weight: Tensor) -> Tensor:
    return weight if weight.dtype in (torch.float32, torch.float64) else weight.float()
