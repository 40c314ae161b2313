"""The interface of a method: what it needs, its advantages, and its loss.

Responsible for: the protocol, and the records that cross it. Not responsible for: sampling and scoring
(rlhf/rollout.py), the gradient step (rlhf/update.py).

Shapes: T packed tokens, S sequences.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from dovetail.batches import Experience, Groups, Rollout, moved
from dovetail.config.stages import PpoConfig
from dovetail.maths.groups import over_tokens_of_sequences
from dovetail.maths.ppo import PolicyLoss


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """A rollout with its rewards; the answers to one prompt follow one another."""

    rollout: Rollout
    """All answers."""
    learnt: Rollout
    """The same answers; those that are left out of the loss have no marked tokens."""
    rewards_T: Tensor
    """float32 [T]: the score on the last action, less the KL penalty at each if the method has it in the reward."""
    values_T: Tensor | None
    """float32 [T]: the critic's; None without a critic."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Advantages:
    """The numbers that a method learns from."""

    learnt: Rollout
    """The answers to learn from, as in `Scored`, perhaps fewer."""
    advantages_T: Tensor
    """float32 [T]."""
    returns_T: Tensor | None = None
    """float32 [T]: the critic's targets; None without a critic."""
    stats: Mapping[str, float] = field(default_factory=dict)
    """Numbers to record, by name."""


class Algorithm(Protocol):
    """A method of policy optimisation. It has no state: what changes over a run is in the engine."""

    @property
    def answers_per_prompt(self) -> int:
        """Answers to each prompt of a rollout."""
        ...

    @property
    def needs_critic(self) -> bool:
        """Return whether a critic is made and trained."""
        ...

    @property
    def needs_old_logprobs(self) -> bool:
        """Return whether the loss compares the actor with the policy that the update began with."""
        ...

    @property
    def kl_in_reward(self) -> bool:
        """Return whether the KL penalty is part of the reward."""
        ...

    @property
    def refill_rounds(self) -> int:
        """Return how often a rollout may ask further prompts for those whose answers are all left out; 0 = never."""
        ...

    def kl_weight(self, config: PpoConfig) -> float:
        """Return the weight of the KL to the reference, in the reward or in the loss; 0 = it has none."""
        ...

    def advantages(self, scored: Scored, config: PpoConfig) -> Advantages:
        """Return the advantages of a scored rollout."""
        ...

    def prepared(self, minibatch: Experience, config: PpoConfig) -> Experience | Groups:
        """Return a minibatch with all that the loss needs of the whole of it, before it is cut.

        `Groups` keeps so many answers in a row together, such as a pair that the loss compares.
        """
        ...

    def loss(
        self, logprobs_T: Tensor, old_T: Tensor, advantages_T: Tensor, micro: Experience, config: PpoConfig
    ) -> PolicyLoss:
        """Return the loss of a micro-batch as a sum over its actions.

        logprobs_T: differentiable. old_T: constants, where the update began; where the method does not need them, the
        same numbers as `logprobs_T`. advantages_T: those of `micro`, if old log-probabilities are needed weighted for
        what the generator drew.
        """
        ...


def keeping(rollout: Rollout, kept_S: Tensor) -> Rollout:
    """Return the rollout with the tokens of all but the kept sequences unmarked, so that nothing is learnt from them.

    kept_S: bool [S], on any device.
    """
    counts = tuple(
        count if kept else 0 for count, kept in zip(rollout.target_counts, kept_S.tolist(), strict=True)
    )
    bounds_S1 = rollout.cu_seqlens_S1
    kept_T = over_tokens_of_sequences(moved(kept_S, bounds_S1.device), bounds_S1, rollout.num_tokens)
    return replace(rollout, mask_T=torch.logical_and(rollout.mask_T, kept_T), target_counts=counts)
