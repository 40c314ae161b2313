"""Prepare the critic before the actor takes its first step.

Responsible for: where the critic's values start, how long the critic learns alone, and what it learns meanwhile.
Not responsible for: the gradient step (training/step.py), the value loss (maths/value_loss.py).

A reward model is trained at the last token alone. Read at any other token, as a critic is, its values are shifted by an
arbitrary amount and explain nothing, so the advantages of the first rollouts push the actor anywhere. Three things
mend that. The values of the first rollout are shifted to the mean of the rewards to come. While the critic learns alone
its targets are the rewards to come themselves, because targets that contain its own wrong values would keep them wrong
(Yuan et al. 2025, arXiv:2503.01491, "value pretraining"). The actor waits until the critic explains something.

Shapes: T packed tokens.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dovetail.batches import PackedBatch
from dovetail.maths.actions import cu_actions
from dovetail.maths.gae import gae
from dovetail.model.forward import masked_index
from dovetail.telemetry.log import say, warn

ENOUGH = 0.2
"""Explained variance at which the actor starts."""
SHARE_OF_RUN = 10
"""The critic learns alone for at most one in so many rollouts of a run."""
RATE_ALONE = 3
"""Times its ordinary learning rate the critic learns with while it is alone, unless the configuration names a rate."""
EPOCHS = 4
"""Passes of the critic over each rollout while it learns alone."""
ANSWERS_PER_STEP = 16
"""Answers of one optimiser step of the critic, at most, while it learns alone."""


@dataclass(slots=True)
class CriticWarmup:
    """The rollouts before the actor's first step."""

    max_rollouts: int
    rollouts: int = 0
    """Rollouts judged so far."""
    steps: int = 0
    """Optimiser steps that the critic took alone."""
    is_over: bool = False
    """Whether the actor learns, too."""

    @classmethod
    def of_run(cls, *, max_rollouts: int, rollouts_of_run: int) -> "CriticWarmup":
        """Bound the warm-up by the setting and by a tenth of the run."""
        bound = min(max_rollouts, rollouts_of_run // SHARE_OF_RUN)
        return cls(max_rollouts=bound, is_over=bound == 0)

    def judge(self, explained_variance: float) -> None:
        """Decide after scoring a rollout, and before learning from it, whether the actor learns from it as well.

        explained_variance: of this rollout, which the critic has not learnt from.
        """
        if self.is_over:
            return
        explains = f"{explained_variance:.2f} of the variance of the rewards to come"
        if explained_variance >= ENOUGH:
            self.is_over = True
            say(f"critic: explains {explains} after {self.rollouts} rollouts of warm-up; the actor starts")
        elif self.rollouts == self.max_rollouts:
            self.is_over = True
            if not explained_variance > 0:
                warn(
                    f"critic: explains {explains} after {self.rollouts} rollouts of warm-up, the most that "
                    "ppo.critic_warmup_rollouts and a tenth of the run allow; the actor starts all the same, and its "
                    "first steps will be noisy: raise ppo.critic_optimizer.learning_rate or make the run longer"
                )
            else:
                say(
                    f"critic: explains {explains} after {self.rollouts} rollouts of warm-up; the actor starts"
                )
        else:
            self.rollouts += 1

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to go on."""
        return {"rollouts": self.rollouts, "steps": self.steps, "is_over": self.is_over}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`."""
        self.rollouts, self.steps, self.is_over = state["rollouts"], state["steps"], state["is_over"]


def minibatch_count(num_answers: int, minibatches: int) -> int:
    """Return into how many steps an epoch of the warm-up is divided: no fewer than an ordinary one."""
    return min(num_answers, max(minibatches, math.ceil(num_answers / ANSWERS_PER_STEP)))


def rewards_to_come(batch: PackedBatch, rewards_T: Tensor, *, gamma: float) -> Tensor:
    """G_t = sum_l gamma^l r_{t+l} to the end of the answer; float32 [T], 0 where the mask is False."""
    index_A = masked_index(batch)
    rewards_A = rewards_T.index_select(0, index_A)
    sums_A = gae(
        rewards_A,
        rewards_A.new_zeros(rewards_A.shape),
        cu_actions(batch.mask_T, batch.cu_seqlens_S1),
        gamma=gamma,
        lam=1.0,
        longest=max(batch.target_counts),
    )
    return sums_A.new_zeros(batch.num_tokens).index_copy(0, index_A, sums_A)
