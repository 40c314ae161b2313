"""The loop that supervised fine-tuning, reward model and DPO share: one gradient step a batch.

Responsible for: order of batches, steps, evaluation, checkpoints and resuming of a stage that learns from data.
Not responsible for: the loss, the batches and the evaluation, which the stage passes in.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from transformers import PreTrainedModel

from dovetail.batches import PackedBatch, SummedLoss, cumulative
from dovetail.config.stages import DpoConfig, RewardConfig, SftConfig
from dovetail.data.loader import BatchOrder
from dovetail.engine.parity import check_training_parity
from dovetail.parallel.shard import sharding_of
from dovetail.planning.memory import total
from dovetail.rlhf.build import optimizer_for
from dovetail.stages.context import Context, resume
from dovetail.stages.rescue import saved_on_error
from dovetail.stages.same_data import SameData
from dovetail.stages.verdict import LossWatch
from dovetail.telemetry.log import say
from dovetail.training.optim import Optimizer
from dovetail.training.rehearsal import halve, probe_of, rehearse
from dovetail.training.step import (
    StepReport,
    Term,
    TokenBudget,
    gradient_step,
    learning_rate_at,
    rehearse_step,
    step_seed,
)
from dovetail.training.step_memory import held_as
from dovetail.training.weights import load_trained, trained_weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """The rows, loss and evaluation of a stage that learns from data."""

    stage: str
    model: PreTrainedModel
    settings: SftConfig | RewardConfig | DpoConfig
    num_rows: int
    batch_of: Callable[[Sequence[int]], PackedBatch]
    """The rows of these numbers as one batch."""
    loss_of: Callable[[Any], SummedLoss]
    evaluate: Callable[[], Mapping[str, float]]
    longest: Sequence[int] = ()
    """The tokens of the longest row, for the parity check."""
    longest_rows: Callable[[int], Sequence[int]] | None = None
    """The indices of so many of the longest rows, for the rehearsal; None: it has none."""
    data: SameData
    """The fingerprints of what is learnt; a stage resumes only with the same ones."""

    @property
    def total_steps(self) -> int:
        """Optimiser steps: `epochs` passes over the rows, at most `max_steps`, at least 1."""
        steps = max(1, round(self.num_rows * self.settings.epochs / self.settings.batch_size))
        return min(steps, self.settings.max_steps) if self.settings.max_steps else steps


def fit(task: Task, context: Context) -> Mapping[str, float]:
    """Train to the end, from the newest checkpoint if there is one; returns the last evaluation."""
    optimizer = optimizer_for(task.model, task.settings.optimizer)
    # A pure function of the step, so that a resumed run sees the same rows.
    order = BatchOrder(task.num_rows, task.settings.batch_size, context.config.seed)
    budget = TokenBudget(task.settings.micro_batch_tokens, may_shrink=context.sharing.may_retry)
    checkpoints = context.checkpoints(task.stage, task.settings)
    say_left_over(task)

    def state() -> dict[str, Any]:
        return {
            "model": trained_weights(task.model),
            "optimizer": optimizer.state_dict(),
            "budget": budget.state_dict(),
            "data": task.data.state_dict(),
        }

    def load(state: Mapping[str, Any]) -> None:
        task.data.load_state_dict(state["data"])
        load_trained(task.model, state["model"])
        optimizer.load_state_dict(state["optimizer"])
        budget.load_state_dict(state["budget"])

    start = resume(checkpoints, load, task.stage, like=state())
    if start < task.total_steps:
        check_forward(task.model, task.batch_of(order.batch(start)), task.longest)
        sharding_of(task.model).reshard()
        rehearse_task(task, optimizer, budget, context.device)
    results: Mapping[str, float] = {}
    losses = LossWatch()
    with (
        context.metrics(task.stage, start=start) as metrics,
        context.progress(task.stage, total=task.total_steps, start=start) as progress,
        checkpoints,
        saved_on_error(checkpoints, state, start=start, world=context.world) as place,
    ):
        for step in range(start, task.total_steps):
            seed_step(context.config.seed, step, sharding_of(task.model).world.rank)
            report = gradient_step(
                task.model,
                optimizer,
                [Term(task.batch_of(order.batch(step)), task.loss_of)],
                max_grad_norm=task.settings.optimizer.max_grad_norm,
                budget=budget,
                learning_rate=rate_of(task, step),
                device=context.device,
            )
            row = step_row(task.stage, report)
            place.done, done, loss = step + 1, step + 1, None
            if done == task.total_steps or done % task.settings.eval_every == 0:
                results = task.evaluate()
                row |= {f"{task.stage}/{name}": value for name, value in results.items()}
                loss = results.get("held_out_loss")
            losses.see(row, step=done)
            metrics.record(done, row)
            progress.advance({"loss": report.loss})
            metric = None if loss is None else -loss
            context.save_if_due(
                checkpoints, state, task.settings, done=done, total=task.total_steps, metric=metric
            )
    return results or task.evaluate()


def rehearse_task(task: Task, optimizer: Optimizer, budget: TokenBudget, device: torch.device) -> None:
    """Do all of a step but the update on the longest rows, so that memory ends now or not at all."""
    probe = probe_of(device)
    if probe is None or task.longest_rows is None:
        return
    batch = task.batch_of(task.longest_rows(min(task.settings.batch_size, task.num_rows)))

    def planned() -> float:
        held = held_as(task.model)
        is_checkpointed = bool(getattr(task.model, "is_gradient_checkpointing", False))
        parts = -(-batch.num_tokens // budget.tokens)
        step = held.training(min(budget.tokens, batch.num_tokens), parts, is_checkpointed=is_checkpointed)
        return total(held.resident(), held.states(), step)

    rehearse(
        lambda: rehearse_step(
            task.model, optimizer, [Term(batch, task.loss_of)], budget=budget, device=device
        ),
        probe=probe,
        what=f"{task.stage}: a step on the longest rows",
        planned=planned,
        shrink=lambda: halve(budget, max(batch.unit_tokens)),
    )


def say_left_over(task: Task) -> None:
    """Say how many rows the batch size leaves over, or repeats, where `epochs` decides the number of steps."""
    wanted = round(task.num_rows * task.settings.epochs)
    read = task.total_steps * task.settings.batch_size
    if task.settings.max_steps is None and read != wanted:
        what = f"{wanted - read} are left over" if read < wanted else f"{read - wanted} are read once more"
        steps = f"{task.total_steps} steps of {task.settings.batch_size} rows"
        say(f"{task.stage}: {steps}; of {wanted} rows {what}")


def check_forward(model: PreTrainedModel, batch: PackedBatch, longest: Sequence[int] = ()) -> None:
    """Compare the training forward of the first rows and the longest with the plain forward; raises ParityError."""
    ids = batch.token_ids_T.tolist()
    rows = [ids[start:end] for start, end in pairwise(cumulative(batch.lengths))]
    report = check_training_parity(model, rows, longest=longest)
    say(
        f"parity: {report.num_tokens} tokens, as trained on and by the plain forward: hidden states differ by "
        f"{report.largest_error:.2g} of their norm at most"
    )


def seed_step(seed: int, step: int, rank: int) -> None:
    """Dropout draws from torch's global generator: seeded anew each step, nothing is to be saved."""
    torch.manual_seed(step_seed(step_seed(seed, step), rank))  # the CPU reads 32 bits alone


def rate_of(task: Task, step: int) -> float:
    """Learning rate of a step."""
    settings = task.settings.optimizer
    return learning_rate_at(
        step,
        peak=settings.learning_rate,
        schedule=settings.schedule,
        warmup_steps=settings.warmup_steps,
        total_steps=task.total_steps,
        final_fraction=settings.final_fraction,
    )


def step_row(stage: str, report: StepReport) -> dict[str, float]:
    """Return the metrics of one optimiser step."""
    row = {
        f"{stage}/loss": report.loss,
        f"{stage}/grad_norm": report.grad_norm,
        f"{stage}/learning_rate": report.learning_rate,
        f"{stage}/tokens": float(report.num_tokens),
        f"{stage}/skipped": float(report.skipped),
    }
    return row | {f"{stage}/{name.split('/')[-1]}": value for name, value in report.stats.items()}
