"""The one gradient step of the project.

Responsible for: cutting batches into micro-batches, adding up their gradients, dividing by the count of the
whole batch, clipping, the finite check, and going on with smaller parts when memory runs out. `backward`
occurs here and nowhere else; supervised fine-tuning, reward model, actor and critic differ in the loss they
pass in.
Not responsible for: losses (maths/), the update rule (training/optim.py), the learning rate
(training/schedule.py).

The gradient does not depend on how the batch is cut, because a loss is a sum and is divided by the number of
targets of the whole batch, known before the first forward pass; never by a micro-batch's own number.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dovetail.batches import MicroBatchable, SummedLoss
from dovetail.errors import TrainingStopped
from dovetail.telemetry.log import warn
from dovetail.training.memory import TokenBudget, retry_on_out_of_memory
from dovetail.training.optim import Optimizer

MAX_SKIPS = 5
"""Steps in a row without a finite gradient after which the run stops."""


@dataclass(frozen=True, slots=True)
class Term:
    """One part of a step's loss: weight * sum of `loss_of` over the batch / the batch's number of targets."""

    batch: MicroBatchable
    loss_of: Callable[[Any], SummedLoss]
    """Loss of one micro-batch of `batch`, on the device."""
    weight: float = 1.0
    name: str = "loss"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """What happened in one gradient step; plain numbers."""

    loss: float
    """Weighted sum of the terms."""
    losses: dict[str, float]
    """Term name -> its loss per target, unweighted."""
    stats: dict[str, float]
    """`term/stat` -> the term's own sums, per target."""
    maxima: dict[str, float]
    """`term/stat` -> the largest over the batch."""
    grad_norm: float
    """2-norm over the model, before clipping."""
    learning_rate: float
    skipped: bool
    """The gradient was not finite: the weights are as they were."""
    num_tokens: int
    """Tokens that went through the model."""


def gradient_step(
    model: nn.Module,
    optimizer: Optimizer,
    terms: Sequence[Term],
    *,
    max_grad_norm: float,
    budget: TokenBudget,
    device: torch.device,
    learning_rate: float,
) -> StepReport:
    """Accumulate the gradient of all terms, clip it over the whole model, and step.

    A step whose loss or gradient is not finite is left out. Raises TrainingStopped after MAX_SKIPS of those
    in a row, and when a single sequence does not fit in memory; ValueError if a loss counts other targets
    than its batch, a batch has none, or two terms share a name.
    """
    if len({term.name for term in terms}) != len(terms):
        raise ValueError(f"two terms of a step have the same name: {[term.name for term in terms]}")
    optimizer.set_learning_rate(learning_rate)
    device_sums, device_norm = retry_on_out_of_memory(
        lambda: _accumulate(optimizer, terms, budget.tokens, device),
        budget,
        clean_up=optimizer.zero_grad,
        unit_tokens=lambda: [unit.num_tokens for term in terms for unit in term.batch.micro_batches(1)],
    )
    values = _stack([value for own in device_sums for value in own.values()] + [device_norm], device)
    totals = _stack([own.total for own in device_sums], device)
    optimizer.step(_clip_scale(totals, values[-1], max_grad_norm, _loss_scale(optimizer)))
    sums, grad_norm = _on_host(device_sums, values, _loss_scale(optimizer))
    losses = {
        term.name: own.total / _global_targets(term.batch) for term, own in zip(terms, sums, strict=True)
    }
    loss = sum(term.weight * losses[term.name] for term in terms)
    is_finite = math.isfinite(loss) and math.isfinite(grad_norm)
    if is_finite:
        _expect_same_targets(terms, sums)
        _record_taken(optimizer)
    else:
        _record_skipped(model, optimizer, losses, grad_norm)
    optimizer.zero_grad()
    return StepReport(
        loss=loss,
        losses=losses,
        stats={
            f"{term.name}/{name}": value / _global_targets(term.batch)
            for term, own in zip(terms, sums, strict=True)
            for name, value in own.stats.items()
        },
        maxima={
            f"{term.name}/{name}": value
            for term, own in zip(terms, sums, strict=True)
            for name, value in own.maxima.items()
        },
        grad_norm=grad_norm,
        learning_rate=learning_rate,
        skipped=not is_finite,
        num_tokens=sum(term.batch.num_tokens for term in terms),
    )


@dataclass(slots=True)
class _Sums:
    """Sums (and maxima) of one term over its micro-batches: on the device while they grow, then on the host."""

    total: Any = 0.0
    count: Any = 0.0
    stats: dict[str, Any] = field(default_factory=dict)
    maxima: dict[str, Any] = field(default_factory=dict)

    def add(self, loss: SummedLoss) -> None:
        self.total = self.total + loss.total.detach()
        self.count = self.count + loss.count
        for name, value in loss.stats.items():
            self.stats[name] = self.stats.get(name, 0.0) + value.detach()
        for name, value in loss.maxima.items():
            self.maxima[name] = torch.maximum(self.maxima.get(name, value), value.detach())

    def values(self) -> list[Any]:
        return [self.total, self.count, *self.stats.values(), *self.maxima.values()]

    def on_host(self, values: Sequence[float]) -> "_Sums":
        end = 2 + len(self.stats)
        stats = dict(zip(self.stats, values[2:end], strict=True))
        return _Sums(values[0], values[1], stats, dict(zip(self.maxima, values[end:], strict=True)))


def _accumulate(
    optimizer: Optimizer, terms: Sequence[Term], max_tokens: int, device: torch.device
) -> tuple[list[_Sums], Tensor]:
    """Gradients of all terms in the optimiser (times the loss scale); their sums and the gradient's norm, on
    the device."""
    optimizer.zero_grad()
    loss_scale = _loss_scale(optimizer)
    sums: list[_Sums] = []
    for term in terms:
        own = _Sums()
        factor = term.weight * loss_scale / _global_targets(term.batch)
        for part in _parts(term.batch, max_tokens):
            loss = term.loss_of(part.to(device))
            (loss.total * factor).backward()  # type: ignore[no-untyped-call]
            own.add(loss)
        sums.append(own)
    return sums, optimizer.grad_norm()


def _clip_scale(totals: Tensor, norm: Tensor, max_norm: float, loss_scale: float) -> Tensor:
    """Scalar on the device: what all gradients are multiplied by; NaN if the step must not be taken.

    totals: the losses; norm: of the gradients, both times the loss scale where there is one. float64.
    """
    factor = (max_norm / (norm / loss_scale + 1e-6)).clamp(max=1.0) / loss_scale
    is_finite = totals.isfinite().all() & norm.isfinite()
    return torch.where(is_finite, factor, torch.nan)


def _parts(batch: MicroBatchable, max_tokens: int) -> list[Any]:
    """The micro-batches that hold targets; the others have no gradient. A batch that fits is not cut."""
    if batch.num_tokens <= max_tokens:
        return [batch]
    return [part for part in batch.micro_batches(max_tokens) if part.num_targets]


def _stack(values: Sequence[Any], device: torch.device) -> Tensor:
    return torch.stack([torch.as_tensor(value, dtype=torch.float64, device=device) for value in values])


def _on_host(sums: Sequence[_Sums], values: Tensor, loss_scale: float) -> tuple[list[_Sums], float]:
    """The sums and the norm as plain numbers; the one time in a step that Python waits for the device."""
    flat: list[float] = values.tolist()
    hosted = []
    for own in sums:
        num = len(own.values())
        hosted.append(own.on_host(flat[:num]))
        del flat[:num]
    return hosted, flat[0] / loss_scale


def _global_targets(batch: MicroBatchable) -> float:
    """What a term is divided by: the targets of the whole batch on all ranks; there is one rank."""
    if batch.num_targets <= 0:
        raise ValueError("a batch without targets (every token masked) has no gradient")
    return batch.num_targets


def _expect_same_targets(terms: Sequence[Term], sums: Sequence[_Sums]) -> None:
    """A loss that counts other things than its batch announced would be scaled wrongly, and silently."""
    for term, own in zip(terms, sums, strict=True):
        if not math.isclose(own.count, term.batch.num_targets, rel_tol=1e-3):
            raise ValueError(
                f"the loss of term {term.name!r} counts {own.count:g} targets, "
                f"its batch has {term.batch.num_targets:g}"
            )


def _loss_scale(optimizer: Optimizer) -> float:
    return optimizer.scaler.scale if optimizer.scaler else 1.0


def _record_taken(optimizer: Optimizer) -> None:
    optimizer.skipped_in_a_row = 0
    if optimizer.scaler:
        optimizer.scaler.record_finite()


def _record_skipped(
    model: nn.Module, optimizer: Optimizer, losses: dict[str, float], grad_norm: float
) -> None:
    """Count, say so, and stop when it is no accident any more."""
    loss_is_finite = all(math.isfinite(loss) for loss in losses.values())
    if optimizer.scaler and loss_is_finite and optimizer.scaler.record_overflow():
        return  # fp16's ordinary way of finding its scale, not an alarm
    optimizer.skipped_in_a_row += 1
    what = ", ".join(f"{name} {value:g}" for name, value in losses.items()) + f", gradient norm {grad_norm:g}"
    warn(f"step skipped, not finite ({optimizer.skipped_in_a_row} in a row): {what}")
    if optimizer.skipped_in_a_row >= MAX_SKIPS:
        diagnosis = _diagnosis(model, optimizer, loss_is_finite)
        optimizer.zero_grad()
        raise TrainingStopped(
            f"{MAX_SKIPS} steps in a row were not finite ({what}): {diagnosis}",
            hint="lower the learning rate or lengthen warmup_steps, use precision=bf16 or fp32, and look at "
            "the rows of these steps with `dovetail data preview`; the last checkpoint is from before",
        )


def _diagnosis(model: nn.Module, optimizer: Optimizer, loss_is_finite: bool) -> str:
    """Where the NaN or infinity is, as far as it can be seen."""
    weights = [name for name, p in model.named_parameters() if not _all_finite(p.detach())]
    if weights:
        return f"{len(weights)} weights of the model are no numbers themselves, the first is {weights[0]}"
    if not loss_is_finite:
        return "all weights are finite, so it comes from the loss or from the rows it was given"
    gradients = [name for name, gradient in optimizer.gradients().items() if not _all_finite(gradient)]
    where = f"; {len(gradients)} gradients are not, the first is {gradients[0]}" if gradients else ""
    return f"weights and loss are finite{where}"


def _all_finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())
