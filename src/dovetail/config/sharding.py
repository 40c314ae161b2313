"""How the weights of each model lie on several devices.

Responsible for: the ZeRO stages, and over how many devices the generating actor is divided.
Not responsible for: what they do (parallel/), how many devices there are.
"""

from typing import Literal

from pydantic import PositiveInt

from dovetail.config.frozen import FrozenModel


class ZeroStageConfig(FrozenModel):
    """What the processes of a run divide of each model (Rajbhandari et al. 2019, arXiv:1910.02054), through FSDP2.

    0: nothing, every process holds all. 1: weights, gradients and optimiser states at rest; gradients are reduced once
    per step. 2: the same, and gradients are reduced after each micro-batch. 3: the same, and weights are gathered layer
    by layer when they are needed. Results do not depend on it but for rounding. One process alone divides nothing.
    """

    actor: Literal[0, 1, 2, 3] = 1
    """The model that stage 1 and PPO train."""
    critic: Literal[0, 1, 2, 3] = 1
    """The model that stage 2 trains, and PPO's critic."""
    reference: Literal[0, 3] = 0
    """PPO's frozen copy of the actor."""
    reward_model: Literal[0, 3] = 0
    """The frozen reward model of PPO."""


class TensorParallelConfig(FrozenModel):
    """How many processes compute each layer together (Shoeybi et al. 2019, arXiv:1909.08053)."""

    generation: Literal["auto"] | PositiveInt = "auto"
    """Processes that hold one copy of the actor while answers are generated; groups of so many share the prompts.
    auto: 1 if by an estimate the whole model fits on a GPU beside what stays there, else as few as fit; 1 on a CPU."""
