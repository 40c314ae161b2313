"""The one gradient step of the project, with its seed, its learning rate, and its way out when memory ends.

Responsible for: cutting batches into micro-batches, adding up their gradients, dividing by the count of the whole
batch, clipping, the finite check, and going on with smaller parts when memory runs out. `backward` occurs here and
nowhere else; supervised fine-tuning, reward model, actor and critic differ in the loss they pass in. Seed and rate
are pure functions of the step: nothing to save, nothing to resume.
Not responsible for: losses (maths/), the update rule (optim.py).

The gradient does not depend on how the batch is cut, because a loss is a sum and is divided by the number of
targets of the whole batch, known before the first forward pass; never by a micro-batch's own number. Where several
processes hold the model, each is given the whole batch and takes its share of it; sums, norm and the verdict on the
step are those of all.
"""

import gc
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, islice
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from dovetail.batches import MicroBatchable, SummedLoss
from dovetail.errors import TrainingStopped
from dovetail.model.placement import is_out_of_memory
from dovetail.model.shards import local
from dovetail.parallel.shard import sharding_of
from dovetail.parallel.world import World, shared_micro_batches
from dovetail.telemetry.log import warn
from dovetail.training.optim import Optimizer

STRIDE = 1_000_003
"""More than the steps of any run: no two runs share the seed of a step."""


def step_seed(seed: int, step: int) -> int:
    """Return the seed of a step, a function of (seed, step) alone, so that a resumed run draws the same numbers.

    Seeds may be nested: `step_seed(step_seed(seed, i), j)` is of its own for each (seed, i, j). 63 bits hold it.
    """
    return (seed * STRIDE + step) % (2**63 - 1)


def learning_rate_at(
    step: int,
    *,
    peak: float,
    schedule: Literal["cosine", "linear", "constant"],
    warmup_steps: int,
    total_steps: int,
    final_fraction: float,
) -> float:
    """Return the rate of optimiser step `step`, counted from 0.

    Warm-up: peak * (step + 1) / warmup_steps, so that no step is spent on a rate of 0 and the last warm-up
    step reaches the peak. After it, with x = (step - warmup_steps) / (total_steps - warmup_steps) in [0,
    1]: linear 1 - x, cosine (1 + cos(pi x)) / 2, constant 1, mapped from [0, 1] to [final_fraction, 1] of
    the peak.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    if schedule == "cosine":
        height = (1.0 + math.cos(math.pi * progress)) / 2.0
    elif schedule == "linear":
        height = 1.0 - progress
    else:
        return peak
    return peak * (final_fraction + (1.0 - final_fraction) * height)


R = TypeVar("R")

# The CPU allocator, cuBLAS and the CUDA driver raise plain RuntimeErrors; these are their words.


@dataclass(slots=True)
class TokenBudget:
    """Tokens of one forward and backward pass. Shared by all that run on a device, halved for all."""

    tokens: int
    may_shrink: bool = True
    """False where processes run the same passes together: one of them cannot go on in smaller parts alone."""
    _asked: int = field(init=False)

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ValueError(f"a micro-batch of {self.tokens} tokens holds nothing")
        self._asked = self.tokens

    def state_dict(self) -> dict[str, int]:
        """Return the budget that was asked for and the one in use."""
        return {"asked": self._asked, "tokens": self.tokens}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue with the budget in use if the same one was asked for; a new setting begins anew."""
        if state["asked"] == self._asked:
            self.tokens = state["tokens"]


def retry_on_out_of_memory(
    attempt: Callable[[], R],
    budget: TokenBudget,
    *,
    clean_up: Callable[[], None] | None = None,
    unit_tokens: Callable[[], Sequence[int]] | None = None,
) -> R:
    """`attempt()`, which reads `budget.tokens`; while it runs out of memory, halve the budget and try again.

    clean_up: undoes a failed attempt, so that a later one gives what a first one would have given.
    unit_tokens: the sizes of the units that cannot be cut (sequences). Asked after a failure: with them the
    budget is halved from what was really used, and the retries end as soon as halving cannot help.
    Raises TrainingStopped when one unit alone does not fit, or the budget may not shrink.
    """
    while True:
        try:
            return attempt()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error).split("\n")[0]
        # Here, outside the except block, the traceback is gone and with it the frames that held activations.
        if clean_up is not None:
            clean_up()
        _release_cached_memory()
        _halve(budget, unit_tokens() if unit_tokens else None, reason)


def _halve(budget: TokenBudget, unit_tokens: Sequence[int] | None, reason: str) -> None:
    if not budget.may_shrink:
        raise TrainingStopped(
            f"a micro-batch of {budget.tokens} tokens does not fit in the memory of one of the processes ({reason})",
            hint=f"start again with micro_batch_tokens={max(1, budget.tokens // 2)}: the run goes on from its last "
            "checkpoint, and results do not depend on it",
        )
    longest = max(unit_tokens) if unit_tokens else 1
    used = min(budget.tokens, sum(unit_tokens)) if unit_tokens else budget.tokens
    if used <= longest:
        what = f"one sequence of {longest} tokens" if unit_tokens else "a micro-batch of one sequence"
        raise TrainingStopped(
            f"{what} does not fit in memory ({reason})",
            hint="turn on activation_checkpointing, lower data.max_tokens or ppo.sampling.max_new_tokens, "
            "train LoRA adapters (actor.lora), or use a smaller model",
        )
    warn(
        f"out of memory: micro-batches halved from {used} to {used // 2} tokens; results do not depend on it"
    )
    budget.tokens = used // 2


def _release_cached_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


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
    """The outcome of one gradient step in plain numbers."""

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
    """Tokens of the batch."""


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
    sums, own_norm = _accumulate_what_fits(model, optimizer, terms, budget, device)
    numbers = _over_all(model, sums, own_norm, device)
    sharding_of(model).before_update()
    optimizer.step(_clip_scale(sums, numbers, max_grad_norm, _loss_scale(optimizer)))
    sums, grad_norm = _on_host(sums, numbers, _loss_scale(optimizer))
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


def rehearse_step(
    model: nn.Module,
    optimizer: Optimizer,
    terms: Sequence[Term],
    *,
    budget: TokenBudget,
    device: torch.device,
) -> None:
    """Do all of a gradient step but the update; weights, states and random numbers stay as they are.

    Out of memory shrinks the budget as in a step.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        _accumulate_what_fits(model, optimizer, terms, budget, device)
    sharding_of(model).before_update()
    optimizer.zero_grad()


@dataclass(slots=True)
class _Sums:
    """Sums (and maxima) of one term over its micro-batches: on the device while they grow, then on the host."""

    total: Any = 0.0
    count: Any = 0.0
    stats: dict[str, Any] = field(default_factory=dict)
    maxima: dict[str, Any] = field(default_factory=dict)

    def add(self, loss: SummedLoss, *, counts: bool) -> None:
        """Add a micro-batch. counts: False adds no sums, but names, and maxima of what another rank counts."""
        self.total = self.total + (loss.total.detach() if counts else 0.0)
        self.count = self.count + (loss.count if counts else 0.0)
        for name, value in loss.stats.items():
            self.stats[name] = self.stats.get(name, 0.0) + (value.detach() if counts else 0.0)
        for name, value in loss.maxima.items():
            self.maxima[name] = torch.maximum(self.maxima.get(name, value), value.detach())

    def sums(self) -> list[Any]:
        return [self.total, self.count, *self.stats.values()]

    def on_host(self, sums: Sequence[float], maxima: Sequence[float]) -> "_Sums":
        stats = dict(zip(self.stats, sums[2:], strict=True))
        return _Sums(sums[0], sums[1], stats, dict(zip(self.maxima, maxima, strict=True)))


def _accumulate_what_fits(
    model: nn.Module, optimizer: Optimizer, terms: Sequence[Term], budget: TokenBudget, device: torch.device
) -> tuple[list[_Sums], Tensor]:
    """Accumulate as `_accumulate` does, in smaller micro-batches where memory runs out."""
    return retry_on_out_of_memory(
        lambda: _accumulate(model, optimizer, terms, budget.tokens, device),
        budget,
        clean_up=optimizer.zero_grad,
        unit_tokens=lambda: [unit.num_tokens for term in terms for unit in term.batch.micro_batches(1)],
    )


def _accumulate(
    model: nn.Module, optimizer: Optimizer, terms: Sequence[Term], max_tokens: int, device: torch.device
) -> tuple[list[_Sums], Tensor]:
    """Accumulate the gradients of all terms, times the loss scale, in the optimiser.

    Returns this rank's sums and the norm of the gradients that are here, both on the device.
    """
    optimizer.zero_grad()
    loss_scale, sharded = _loss_scale(optimizer), sharding_of(model)
    cut = [_parts(term.batch, max_tokens, sharded.world) for term in terms]
    num_left = sum(map(len, cut))
    sums: list[_Sums] = []
    for term, parts in zip(terms, cut, strict=True):
        own = _Sums()
        factor = term.weight * loss_scale / _global_targets(term.batch)
        for part, counts in parts:
            num_left -= 1
            sharded.before_backward(is_last=num_left == 0)
            loss = term.loss_of(part.to(device))
            (loss.total * (factor if counts else 0.0)).backward()  # type: ignore[no-untyped-call]
            own.add(loss, counts=counts)
        sums.append(own)
    sharded.reduce_gradients(optimizer.gradients())
    return sums, optimizer.grad_norm(sharded.counted_elsewhere())


def _over_all(model: nn.Module, sums: Sequence[_Sums], norm: Tensor, device: torch.device) -> Tensor:
    """Reduce over all ranks, in float64 on the device: sums and maxima of each term, and the gradient's norm."""
    sharded = sharding_of(model)
    layout = sharded.layout
    added = [value for own in sums for value in own.sums()]
    largest = [value for own in sums for value in own.maxima.values()]
    # Processes that share a copy hold other rows of its gradient: the squares add up, replica by replica.
    if layout.is_sharded:
        summed = layout.world.sum(_together([*added, norm.double() ** 2 / layout.num_replicas], device))
        numbers = torch.cat([summed[:-1], layout.world.max(_together(largest, device)), summed[-1:].sqrt()])
    else:
        summed = layout.world.sum(_together(added, device))
        numbers = torch.cat([summed, layout.world.max(_together([*largest, norm], device))])
    return torch.cat([numbers[:-1], sharded.whole_norm(numbers[-1:])])


def _clip_scale(sums: Sequence[_Sums], numbers: Tensor, max_norm: float, loss_scale: float) -> Tensor:
    """Return the factor of all gradients as a scalar on the device; NaN if the step must not be taken.

    numbers: of `_over_all`; the norm among them is times the loss scale.
    """
    starts = list(accumulate((len(own.sums()) for own in sums), initial=0))[:-1]
    norm = numbers[-1]
    factor = (max_norm / (norm / loss_scale + 1e-6)).clamp(max=1.0) / loss_scale
    is_finite = norm.isfinite()
    for start in starts:
        is_finite = is_finite & numbers[start].isfinite()
    return torch.where(is_finite, factor, torch.nan)


def _on_host(sums: Sequence[_Sums], numbers: Tensor, loss_scale: float) -> tuple[list[_Sums], float]:
    """Read the sums and the norm as plain numbers; here alone a step waits for the device."""
    flat: list[float] = numbers.tolist()
    num_added = sum(len(own.sums()) for own in sums)
    added, largest = iter(flat[:num_added]), iter(flat[num_added:-1])
    hosted = [
        own.on_host(list(islice(added, len(own.sums()))), list(islice(largest, len(own.maxima))))
        for own in sums
    ]
    return hosted, flat[-1] / loss_scale


def _parts(batch: MicroBatchable, max_tokens: int, world: World) -> list[tuple[Any, bool]]:
    """Return (micro-batch, whether it counts) for this rank, leaving out micro-batches without targets.

    A batch that fits is not cut where one process works on it.
    """
    if world.size > 1:
        return shared_micro_batches(batch, max_tokens, world)
    if batch.num_tokens <= max_tokens:
        return [(batch, True)]
    return [(part, True) for part in batch.micro_batches(max_tokens) if part.num_targets]


def _together(values: Sequence[Any], device: torch.device) -> Tensor:
    """Stack scalars as float64."""
    scalars = [torch.as_tensor(value, dtype=torch.float64, device=device) for value in values]
    return torch.stack(scalars) if scalars else torch.zeros(0, dtype=torch.float64, device=device)


def _global_targets(batch: MicroBatchable) -> float:
    """Return what a term is divided by: the targets of the whole batch, over all ranks."""
    if batch.num_targets <= 0:
        raise ValueError("a batch without targets (every token masked) has no gradient")
    return batch.num_targets


def _expect_same_targets(terms: Sequence[Term], sums: Sequence[_Sums]) -> None:
    """Raise ValueError if a loss counts other targets than its batch announced, because it would be scaled wrongly."""
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
    """Count a skipped step, warn, and stop when too many follow one another."""
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
    """Locate the NaN or infinity as far as it can be seen."""
    weights = [name for name, p in model.named_parameters() if not _all_finite(local(p))]
    if weights:
        return (
            f"{len(weights)} weights of the model are NaN or infinite themselves; the first is {weights[0]}"
        )
    if not loss_is_finite:
        return "all weights are finite, so it comes from the loss or from the rows it was given"
    gradients = [name for name, gradient in optimizer.gradients().items() if not _all_finite(gradient)]
    where = f"; {len(gradients)} gradients are not, the first is {gradients[0]}" if gradients else ""
    return f"weights and loss are finite{where}"


def _all_finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())
