"""Learn from experience: PPO's two losses, each in the project's one gradient step.

Responsible for: epochs and minibatches over one rollout, the actor's and the critic's loss, mixture training and
the moving average.
Not responsible for: the equations (maths/), accumulation and clipping (training/step.py), the loop (stages/ppo.py).

Shapes: T packed tokens.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dovetail.batches import Experience, PackedBatch, SummedLoss
from dovetail.config.stages import OptimizerConfig, PpoConfig
from dovetail.maths.mismatch import importance_weights, mismatch
from dovetail.maths.policy_loss import clipped_policy_loss
from dovetail.maths.value_loss import clipped_value_loss
from dovetail.model.forward import cross_entropy, token_logprobs
from dovetail.rlhf.critic_warmup import EPOCHS, RATE_ALONE, CriticWarmup, minibatch_count, rewards_to_come
from dovetail.rlhf.roles import Roles
from dovetail.training.ema import Ema
from dovetail.training.optim import Optimizer
from dovetail.training.parking import Parkable
from dovetail.training.schedule import learning_rate_at
from dovetail.training.seeds import step_seed
from dovetail.training.step import StepReport, Term, gradient_step


@dataclass(slots=True, kw_only=True)
class Learners:
    """The optimisers, average and counters of the two trained roles."""

    actor: Optimizer
    critic: Optimizer
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
    parks: bool = False
    """Whether `parked` moves anything."""

    @contextmanager
    def parked(self) -> Iterator[None]:
        """Keep optimisers and average in host memory within the block, if asked for; nothing learns meanwhile."""
        waiting: list[Parkable] = [self.actor, self.critic, self.ema] if self.parks else []
        with ExitStack() as stack:
            for part in waiting:
                part.park()
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
    out of the loss is skipped.
    """
    own_seed = step_seed(seed, iteration)
    if not learners.warmup.is_over:
        return update_critic_alone(experience, roles, learners, config, seed=own_seed)
    actor_steps: list[StepReport] = []
    critic_steps: list[StepReport] = []
    for minibatch in minibatches(
        experience, epochs=config.ppo_epochs, count=config.minibatches, seed=own_seed
    ):
        texts = next_texts(learners.actor_step) if next_texts else None
        actor_steps.append(actor_step(minibatch, texts, roles, learners, config))
        learners.ema.update()
        critic_steps.append(critic_step(minibatch, roles, learners, config))
    return summarise(actor_steps, critic_steps)


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
    for minibatch in minibatches(targets, epochs=EPOCHS, count=count, seed=seed):
        rising = min(1.0, (learners.warmup.steps + 1) / max(1, config.critic_optimizer.warmup_steps))
        steps.append(critic_gradient_step(minibatch, roles, learners, unclipped, peak * rising))
        learners.warmup.steps += 1
    learners.left_out += config.ppo_epochs * config.minibatches
    return summarise([], steps)


def minibatches(experience: Experience, *, epochs: int, count: int, seed: int) -> Iterator[Experience]:
    """Divide all answers, in a fresh order each epoch, into `count` minibatches of whole sequences.

    With one minibatch the order of the rollout is kept: training then packs exactly as scoring did. Minibatches
    without targets are left out.
    """
    num = experience.num_sequences
    for epoch in range(epochs):
        generator = torch.Generator().manual_seed(seed + epoch)
        order = torch.randperm(num, generator=generator).tolist() if count > 1 else list(range(num))
        for part in range(count):
            index = order[part * num // count : (part + 1) * num // count]
            if any(experience.target_counts[i] for i in index):
                yield experience.sequences(index) if count > 1 else experience


def actor_step(
    minibatch: Experience, texts: PackedBatch | None, roles: Roles, learners: Learners, config: PpoConfig
) -> StepReport:
    """Take one step of the actor on the clipped surrogate, with the pretraining loss beside it if there are texts."""
    terms = [Term(minibatch, partial(policy_loss, roles.actor, config=config), name="policy")]
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
    return gradient_step(
        roles.critic,
        learners.critic,
        [Term(minibatch, partial(value_loss, roles, config=config), name="value")],
        max_grad_norm=config.critic_optimizer.max_grad_norm,
        budget=roles.budget,
        learning_rate=learning_rate,
        device=roles.device,
    )


def policy_loss(actor: PreTrainedModel, micro: Experience, *, config: PpoConfig) -> SummedLoss:
    """PPO's clipped surrogate over the actions of one micro-batch, weighted for what the generator drew.

    Three policies: the generator's mu drew the tokens, pi_old is where this update began, pi is the actor now.
    The ratio that is clipped is pi / pi_old; the weight, a constant, is pi_old / mu. Without old log-probabilities
    this forward is the first since the rollout, so pi_old is pi: a ratio of exactly 1, which carries the gradient.
    """
    begins = micro.old_logprobs_T is None
    found = token_logprobs(actor, micro, temperature=config.sampling.temperature, with_entropy=begins)
    old_T = found.logprobs_T.detach() if micro.old_logprobs_T is None else micro.old_logprobs_T
    advantages_T, mask_T, stats = micro.advantages_T, micro.mask_T, dict[str, Tensor]()
    if config.importance_cap is not None:
        weights_T = importance_weights(old_T, micro.sampled_logprobs_T, mask_T, cap=config.importance_cap)
        advantages_T = advantages_T * weights_T
        stats["capped"] = ((weights_T == config.importance_cap) & mask_T).sum()
    loss = clipped_policy_loss(found.logprobs_T, old_T, advantages_T, mask_T, clip=config.ratio_clip)
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
    loss = clipped_value_loss(
        values_T, micro.old_values_T, micro.returns_T, micro.mask_T, clip=config.value_clip
    )
    return SummedLoss(loss.total, loss.count, {"clipped": loss.num_clipped})


def language_model_loss(model: PreTrainedModel, micro: PackedBatch) -> SummedLoss:
    """Cross-entropy of the marked tokens: supervised fine-tuning's loss, and mixture training's."""
    return SummedLoss(cross_entropy(model, micro), micro.mask_T.sum())


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
    """Average over the steps of one rollout; nothing is said of a model that took none."""
    stats = {"ppo/skipped_steps": float(sum(r.skipped for r in [*actor_steps, *critic_steps]))}
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
