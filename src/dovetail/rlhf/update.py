"""Learn from experience: PPO's two losses, each in the project's one gradient step.

Responsible for: epochs and minibatches over one rollout, the actor's and the critic's loss, mixture training, the
moving average, and the critic's warm-up.
Not responsible for: the equations (maths/), accumulation and clipping (training/step.py), the loop (stages/ppo.py).

A reward model is trained at the last token alone. Read at any other token, as a critic is, its values are shifted by
an arbitrary amount and explain nothing, so the advantages of the first rollouts push the actor anywhere. Three things
mend that. The values of the first rollout are shifted to the mean of the rewards to come. While the critic learns
alone its targets are the rewards to come themselves, because targets that contain its own wrong values would keep
them wrong (Yuan et al. 2025, arXiv:2503.01491, "value pretraining"). The actor waits until the critic explains
something.

Shapes: T packed tokens.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dovetail.batches import Experience, Groups, PackedBatch, SummedLoss
from dovetail.config.stages import OptimizerConfig, PpoConfig
from dovetail.maths.ppo import clipped_value_loss, importance_weights, mismatch
from dovetail.model.forward import language_model_loss, token_logprobs
from dovetail.rlhf.algorithms.ppo import rewards_to_come
from dovetail.rlhf.algorithms.protocol import Algorithm
from dovetail.rlhf.roles import Roles
from dovetail.telemetry.log import say, warn
from dovetail.training.offload import Offloadable
from dovetail.training.optim import Ema, Optimizer
from dovetail.training.step import StepReport, Term, gradient_step, learning_rate_at, step_seed

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
    """True when the actor learns, too."""

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


@dataclass(slots=True, kw_only=True)
class Learners:
    """The optimisers, average and counters of the two trained roles."""

    actor: Optimizer
    critic: Optimizer | None
    """None without a critic."""
    ema: Ema
    total_steps: int
    """Optimiser steps of the whole run, for the schedules."""
    actor_step: int = 0
    """Optimiser steps that the actor has taken."""
    critic_step: int = 0
    """Optimiser steps that the critic has taken beside the actor."""
    left_out: int = 0
    """The part of `total_steps` that the critic's warm-up takes from both schedules."""
    warmup: CriticWarmup
    """The progress of the critic's warm-up."""
    offloads: bool = False
    """True where `offloaded` moves anything."""

    @contextmanager
    def offloaded(self) -> Iterator[None]:
        """Keep optimisers and average in host memory within the block, if asked for; nothing learns meanwhile."""
        learners = (self.actor, self.critic, self.ema)
        waiting: list[Offloadable] = [part for part in learners if part is not None and self.offloads]
        with ExitStack() as stack:
            for part in waiting:
                part.offload()
                stack.callback(part.restore)
            yield


@dataclass(frozen=True, slots=True)
class UpdateReport:
    """Means over the optimiser steps of one rollout."""

    actor_loss: float
    critic_loss: float
    stats: dict[str, float]


def update(
    experience: Experience,
    roles: Roles,
    learners: Learners,
    config: PpoConfig,
    *,
    iteration: int,
    seed: int,
    next_texts: Callable[[int], PackedBatch] | None = None,
) -> UpdateReport:
    """Take `ppo_epochs` x `minibatches` steps of actor and critic on the rollout of an iteration.

    seed: the run's.
    next_texts: gives the pretraining texts of an optimiser step; their loss joins the actor's in the same step
    (PPO-ptx, InstructGPT equation 2), each normalised by its own number of tokens.

    Until its warm-up is over the critic learns alone (`update_critic_alone`). A minibatch whose answers are all left
    out of the loss is skipped. The first step whose forward finds the actor beyond `approx_kl_stop` is the last; the KL
    is that of all processes, so they stop together. The schedules leave out the steps that are not taken.
    """
    own_seed = step_seed(seed, iteration)
    if not learners.warmup.is_over:
        return update_critic_alone(experience, roles, learners, config, seed=own_seed)
    actor_steps: list[StepReport] = []
    critic_steps: list[StepReport] = []
    for minibatch in minibatches(
        experience,
        epochs=config.ppo_epochs,
        count=config.minibatches,
        seed=own_seed,
        answers_per_prompt=roles.algorithm.answers_per_prompt,
    ):
        texts = next_texts(learners.actor_step) if next_texts else None
        actor_steps.append(actor_step(minibatch, texts, roles, learners, config))
        learners.ema.update()
        if roles.critic is not None:
            critic_steps.append(critic_step(minibatch, roles, learners, config))
        if is_far(actor_steps[-1], config.approx_kl_stop):
            break
    learners.left_out += config.ppo_epochs * config.minibatches - len(actor_steps)
    report = summarise(actor_steps, critic_steps)
    if config.approx_kl_stop is not None and actor_steps:
        report.stats["ppo/stopped_by_kl"] = float(is_far(actor_steps[-1], config.approx_kl_stop))
    return report


def is_far(step: StepReport, limit: float | None) -> bool:
    """Return whether a step began with the actor farther than the limit from where the update began."""
    return limit is not None and step.stats["policy/approx_kl"] > limit


def update_critic_alone(
    experience: Experience, roles: Roles, learners: Learners, config: PpoConfig, *, seed: int
) -> UpdateReport:
    """Teach the critic the rewards to come of one rollout, at the warm-up's own rate, which rises over its first steps.

    The value is not clipped: the critic has far to go, and no policy has learnt from its old values yet.
    """
    targets = replace(
        experience, returns_T=rewards_to_come(experience, experience.rewards_T, gamma=config.gamma)
    )
    count = minibatch_count(experience.num_sequences, config.minibatches)
    peak = config.critic_warmup_learning_rate or RATE_ALONE * config.critic_optimizer.learning_rate
    unclipped = config.model_copy(update={"value_clip": None})
    steps: list[StepReport] = []
    size = roles.algorithm.answers_per_prompt
    for minibatch in minibatches(targets, epochs=EPOCHS, count=count, seed=seed, answers_per_prompt=size):
        rising = min(1.0, (learners.warmup.steps + 1) / max(1, config.critic_optimizer.warmup_steps))
        steps.append(critic_gradient_step(minibatch, roles, learners, unclipped, peak * rising))
        learners.warmup.steps += 1
    learners.left_out += config.ppo_epochs * config.minibatches
    return summarise([], steps)


def minibatches(
    experience: Experience, *, epochs: int, count: int, seed: int, answers_per_prompt: int = 1
) -> Iterator[Experience]:
    """Divide all answers, in a fresh order each epoch, into `count` minibatches of whole sequences.

    The answers to a prompt stay together, so that it is computed once, but for those at the bounds of minibatches
    where the prompts do not divide evenly. Each minibatch keeps the order of the rollout; with one minibatch, and all
    answers in it, training packs exactly as scoring did. Answers without targets are left out.
    """
    num = experience.num_sequences
    prompt_of = [answer // answers_per_prompt for answer in range(num)]
    for epoch in range(epochs):
        generator = torch.Generator().manual_seed(step_seed(seed, epoch))
        shuffled = torch.randperm(num, generator=generator).tolist() if count > 1 else list(range(num))
        order = with_groups_together(shuffled, prompt_of)
        for part in range(count):
            dealt = sorted(order[part * num // count : (part + 1) * num // count])
            index = [i for i in dealt if experience.target_counts[i]]
            if index:
                yield experience if len(index) == num else experience.sequences(index)


def with_groups_together(order: Sequence[int], group_of: Sequence[int]) -> list[int]:
    """Return the order with all members of a group moved up to its first."""
    members: dict[int, list[int]] = {}
    for index in order:
        members.setdefault(group_of[index], []).append(index)
    return [index for group in members.values() for index in group]


def actor_step(
    minibatch: Experience, texts: PackedBatch | None, roles: Roles, learners: Learners, config: PpoConfig
) -> StepReport:
    """Take one step of the actor on the algorithm's loss, with the pretraining loss beside it if there are texts."""
    algorithm = roles.algorithm
    own_loss = partial(policy_loss, roles.actor, config=config, algorithm=algorithm)
    terms = [Term(algorithm.prepared(minibatch, config), own_loss, name="policy")]
    if texts is not None:
        terms.append(
            Term(texts, partial(language_model_loss, roles.actor), config.ptx_coefficient, name="ptx")
        )
    report = gradient_step(
        roles.actor,
        learners.actor,
        terms,
        max_grad_norm=config.actor_optimizer.max_grad_norm,
        budget=roles.budget,
        learning_rate=rate_at(learners, config.actor_optimizer, learners.actor_step),
        device=roles.device,
    )
    learners.actor_step += 1
    return report


def critic_step(minibatch: Experience, roles: Roles, learners: Learners, config: PpoConfig) -> StepReport:
    """Take one step of the critic beside the actor's, at the rate of its schedule."""
    rate = rate_at(learners, config.critic_optimizer, learners.critic_step)
    learners.critic_step += 1
    return critic_gradient_step(minibatch, roles, learners, config, rate)


def critic_gradient_step(
    minibatch: Experience, roles: Roles, learners: Learners, config: PpoConfig, learning_rate: float
) -> StepReport:
    """Take one step of the critic on the clipped squared error."""
    assert learners.critic is not None
    return gradient_step(
        roles.held_critic,
        learners.critic,
        [Term(minibatch, partial(value_loss, roles, config=config), name="value")],
        max_grad_norm=config.critic_optimizer.max_grad_norm,
        budget=roles.budget,
        learning_rate=learning_rate,
        device=roles.device,
    )


def policy_loss(
    actor: PreTrainedModel, part: Experience | Groups, *, config: PpoConfig, algorithm: Algorithm
) -> SummedLoss:
    """Sum the algorithm's loss, such as PPO's clipped surrogate, over one micro-batch, weighted for what was drawn.

    Three policies: the generator's mu drew the tokens, pi_old is where this update began, pi is the actor now.
    The ratio that is clipped is pi / pi_old; the weight, a constant, is pi_old / mu. Without old log-probabilities
    this forward is the first since the rollout, so pi_old is pi: a ratio of exactly 1, which carries the gradient.
    """
    micro = part.batch if isinstance(part, Groups) else part
    assert isinstance(micro, Experience)
    begins = micro.old_logprobs_T is None
    found = token_logprobs(actor, micro, temperature=config.sampling.temperature, with_entropy=begins)
    old_T = found.logprobs_T.detach() if micro.old_logprobs_T is None else micro.old_logprobs_T
    advantages_T, mask_T, stats = micro.advantages_T, micro.mask_T, dict[str, Tensor]()
    if config.importance_cap is not None and algorithm.needs_old_logprobs:
        weights_T = importance_weights(old_T, micro.sampled_logprobs_T, mask_T, cap=config.importance_cap)
        advantages_T = advantages_T * weights_T
        stats["capped"] = ((weights_T == config.importance_cap) & mask_T).sum()
    loss = algorithm.loss(found.logprobs_T, old_T, advantages_T, micro, config)
    stats |= {"clipped": loss.num_clipped, "approx_kl": loss.kl_sum, "clamped": loss.num_clamped}
    if not begins:
        return SummedLoss(loss.total, loss.count, stats)
    assert found.entropy_T is not None
    gap = mismatch(old_T, micro.sampled_logprobs_T, mask_T)
    stats |= {"gap": gap.gap_sum, "mismatch_kl": gap.kl_sum, "entropy": found.entropy_T.sum()}
    return SummedLoss(loss.total, loss.count, stats, {"gap": gap.gap_max})


def value_loss(roles: Roles, micro: Experience, *, config: PpoConfig) -> SummedLoss:
    """Sum the clipped squared error over the actions of one micro-batch."""
    values_T = roles.values_of(micro)
    assert micro.old_values_T is not None
    assert micro.returns_T is not None
    loss = clipped_value_loss(
        values_T, micro.old_values_T, micro.returns_T, micro.mask_T, clip=config.value_clip
    )
    return SummedLoss(loss.total, loss.count, {"clipped": loss.num_clipped})


def rate_at(learners: Learners, optimizer: OptimizerConfig, step: int) -> float:
    """Return the learning rate of step number `step` of actor or critic, which decays over what the warm-up left."""
    return learning_rate_at(
        step,
        peak=optimizer.learning_rate,
        schedule=optimizer.schedule,
        warmup_steps=optimizer.warmup_steps,
        total_steps=learners.total_steps - learners.left_out,
        final_fraction=optimizer.final_fraction,
    )


def of_the_rollout(step: StepReport) -> dict[str, float]:
    """Return what `rollout_stats` reports where scoring runs the actor, measured by the update's first forward."""
    return {
        "ppo/entropy_nats_per_token": step.stats["policy/entropy"],
        "rollout/logprob_gap_mean": step.stats["policy/gap"],
        "rollout/logprob_gap_max": step.maxima["policy/gap"],
        "rollout/mismatch_kl_nats_per_token": step.stats["policy/mismatch_kl"],
    }


def summarise(actor_steps: list[StepReport], critic_steps: list[StepReport]) -> UpdateReport:
    """Average over the steps of one rollout; a model that took none has no averages."""
    stats = {
        "ppo/actor_steps": float(len(actor_steps)),
        "ppo/skipped_steps": float(sum(r.skipped for r in [*actor_steps, *critic_steps])),
    }
    if critic_steps:
        stats |= {
            "ppo/critic_loss": fmean(r.loss for r in critic_steps),
            "ppo/critic_grad_norm": fmean(r.grad_norm for r in critic_steps),
            "ppo/critic_learning_rate": critic_steps[-1].learning_rate,
            "ppo/value_clipped_fraction": fmean(r.stats["value/clipped"] for r in critic_steps),
        }
    if actor_steps:
        stats |= {
            "ppo/actor_loss": fmean(r.losses["policy"] for r in actor_steps),
            "ppo/actor_grad_norm": fmean(r.grad_norm for r in actor_steps),
            "ppo/clipped_fraction": fmean(r.stats["policy/clipped"] for r in actor_steps),
            "ppo/clamped_fraction": fmean(r.stats["policy/clamped"] for r in actor_steps),
            "ppo/approx_kl_nats_per_token": fmean(r.stats["policy/approx_kl"] for r in actor_steps),
            "ppo/learning_rate": actor_steps[-1].learning_rate,
        }
        if "policy/capped" in actor_steps[0].stats:
            stats["ppo/importance_capped_fraction"] = fmean(r.stats["policy/capped"] for r in actor_steps)
        if "policy/gap" in actor_steps[0].stats:
            stats |= of_the_rollout(actor_steps[0])
        if "ptx" in actor_steps[0].losses:
            stats["ppo/ptx_loss"] = fmean(r.losses["ptx"] for r in actor_steps)
    return UpdateReport(stats.get("ppo/actor_loss", 0.0), stats.get("ppo/critic_loss", 0.0), stats)
