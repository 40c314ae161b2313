"""How the weights of each model lie on several devices.

Responsible for: the ZeRO stages. Not responsible for: what they do (parallel/shard.py), how many devices there are.
"""

from typing import Literal

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
