"""Gradient accumulation over calls, as the predecessor's loop asks for it.

Responsible for: collecting the losses of several calls and taking one optimiser step on all of them.
Not responsible for: the losses (trainer.py), the step itself (training/step.py).
"""

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from dovetail.batches import PackedBatch, SummedLoss
from dovetail.config.stages import OptimizerConfig
from dovetail.parallel.shard import sharding_of
from dovetail.parallel.world import shared_micro_batches
from dovetail.rlhf.roles import Roles
from dovetail.training.optim import Optimizer
from dovetail.training.step import Term, gradient_step, learning_rate_at, retry_on_out_of_memory


class AccumulatedSteps:
    """The optimiser steps of one model, each on the mean of `size` losses that are added one by one."""

    def __init__(
        self,
        model: PreTrainedModel,
        optimizer: Optimizer,
        settings: OptimizerConfig,
        roles: Roles,
        *,
        size: int,
        total_steps: int,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.settings = settings
        self.roles = roles
        self.size = size
        self.total_steps = total_steps
        self.taken = 0
        self.overflowed = False
        self._waiting: list[Term] = []

    def add(
        self, batch: PackedBatch, loss_of: Callable[[Any], SummedLoss], weight: float = 1.0
    ) -> torch.Tensor:
        """Return the loss per target of `batch`, unweighted; every `size`-th call takes a step.

        The weights do not change between two steps, so that losses are waiting to be computed until the step is
        taken: what an earlier call returns comes from a forward pass of its own.
        """
        term = Term(batch, loss_of, weight / self.size, name=f"loss {len(self._waiting)}")
        self._waiting.append(term)
        if len(self._waiting) < self.size:
            return torch.tensor(self._loss(term))
        report = gradient_step(
            self.model,
            self.optimizer,
            self._waiting,
            max_grad_norm=self.settings.max_grad_norm,
            budget=self.roles.budget,
            device=self.roles.device,
            learning_rate=self.learning_rate(),
        )
        self._waiting = []
        self.taken += 1
        self.overflowed = report.skipped
        return torch.tensor(report.losses[term.name])

    def learning_rate(self) -> float:
        """Return the rate of the coming step."""
        return learning_rate_at(
            self.taken,
            peak=self.settings.learning_rate,
            schedule=self.settings.schedule,
            warmup_steps=self.settings.warmup_steps,
            total_steps=self.total_steps,
            final_fraction=self.settings.final_fraction,
        )

    @torch.no_grad()
    def _loss(self, term: Term) -> float:
        total = retry_on_out_of_memory(
            lambda: self._total(term), self.roles.budget, unit_tokens=lambda: term.batch.unit_tokens
        )
        sharding_of(self.model).reshard()
        return total / term.batch.num_targets

    def _total(self, term: Term) -> float:
        """Return the sum over all processes' shares of the batch."""
        world = sharding_of(self.model).world
        total = torch.zeros((), dtype=torch.float64, device=self.roles.device)
        for micro, counts in shared_micro_batches(term.batch, self.roles.budget.tokens, world):
            loss = term.loss_of(micro.to(self.roles.device))
            total += loss.total if counts else 0.0
        return world.sum(total).item()
