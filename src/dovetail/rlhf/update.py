"""Learn from experience: PPO's two losses, each in the project's one gradient step.

Responsible for: epochs and minibatches over one rollout, the actor's and the critic's loss, mixture training and
the moving average.
Not responsible for: the equations (maths/), accumulation and clipping (training/step.py), the loop (stages/ppo.py).

Shapes: T packed tokens.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import fmean

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dovetail.batches import Experience, PackedBatch, SummedLoss
from dovetail.config.stages import OptimizerConfig, PpoConfig
from dovetail.maths.kl import adaptive_kl_coefficient
from dovetail.maths.mismatch import importance_weights, mismatch
from dovetail.maths.policy_loss import clipped_policy_loss
from dovetail.maths.value_loss import clipped_value_loss
from dovetail.model.forward import cross_entropy, token_logprobs, token_values
from dovetail.rlhf.roles import Roles
from dovetail.rlhf.rollout import Collected
from dovetail.training.ema import Ema
from dovetail.training.optim import Optimizer
from dovetail.training.parking import Parkable
from dovetail.training.schedule import learning_rate_at
from dovetail.training.seeds import step_seed
from dovetail.training.step import StepReport, Term, gradient_step


@dataclass(slots=True, kw_only=True)
class Learners:
    """What the two trained roles need beside their weights."""

    actor: Optimizer
    critic: Optimizer
    ema: Ema
    total_steps: int
    """Optimiser steps of the whole run, for the schedules."""
    step: int = 0
    """Optimiser steps taken."""
    parks: bool = False
    """Whether `parked` does anything."""

    @contextmanager
    def parked(self) -> Iterator[None]:
        """Within the block, optimisers and average wait in host memory, if asked for; nothing learns meanwhile."""
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
    """`ppo_epochs` x `minibatches` steps of critic and, after its warm-up, actor on the rollout of an iteration.

    seed: the run's.
    next_texts: gives the pretraining texts of an optimiser step; their loss joins the actor's in the same step
    (PPO-ptx, InstructGPT equation 2), each normalised by its own number of tokens.
    """
    actor_steps: list[StepReport] = []
    critic_steps: list[StepReport] = []
    own_seed = step_seed(seed, iteration)
    for minibatch in minibatches(
        experience, epochs=config.ppo_epochs, count=config.minibatches, seed=own_seed
    ):
        if config.trains_actor(iteration):
            texts = next_texts(learners.step) if next_texts else None
            actor_steps.append(actor_step(minibatch, texts, roles, learners, config))
            learners.ema.update()
        critic_steps.append(critic_step(minibatch, roles, learners, config))
        learners.step += 1
    return summarise(actor_steps, critic_steps)


def minibatches(experience: Experience, *, epochs: int, count: int, seed: int) -> Iterator[Experience]:
    """Each epoch deals all answers, in a fresh order, into `count` minibatches of whole sequences.

    With one minibatch the order of the rollout is kept: training then packs exactly as scoring did.
    """
    num = experience.num_sequences
    for epoch in range(epochs):
        if count == 1:
            yield experience
            continue
        generator = torch.Generator().manual_seed(seed + epoch)
        order = torch.randperm(num, generator=generator).tolist()
        for part in range(count):
            yield experience.sequences(order[part * num // count : (part + 1) * num // count])


def actor_step(
    minibatch: Experience, texts: PackedBatch | None, roles: Roles, learners: Learners, config: PpoConfig
) -> StepReport:
    """One step of the actor on the clipped surrogate, with the pretraining loss beside it if there are texts."""
    terms = [Term(minibatch, partial(policy_loss, roles.actor, config=config), name="policy")]
    if texts is not None:
        terms.append(
            Term(texts, partial(language_model_loss, roles.actor), config.ptx_coefficient, name="ptx")
        )
    rate = rate_at(learners, config.actor_optimizer)
    return gradient_step(
        roles.actor,
        learners.actor,
        terms,
        max_grad_norm=config.actor_optimizer.max_grad_norm,
        budget=roles.budget,
        learning_rate=rate,
        device=roles.device,
    )


def critic_step(minibatch: Experience, roles: Roles, learners: Learners, config: PpoConfig) -> StepReport:
    """One step of the critic on the clipped squared error."""
    return gradient_step(
        roles.critic,
        learners.critic,
        [Term(minibatch, partial(value_loss, roles.critic, config=config), name="value")],
        max_grad_norm=config.critic_optimizer.max_grad_norm,
        budget=roles.budget,
        learning_rate=rate_at(learners, config.critic_optimizer),
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


def value_loss(critic: PreTrainedModel, micro: Experience, *, config: PpoConfig) -> SummedLoss:
    """The clipped squared error over the actions of one micro-batch."""
    values_T = token_values(critic, micro)
    loss = clipped_value_loss(
        values_T, micro.old_values_T, micro.returns_T, micro.mask_T, clip=config.value_clip
    )
    return SummedLoss(loss.total, loss.count, {"clipped": loss.num_clipped})


def language_model_loss(model: PreTrainedModel, micro: PackedBatch) -> SummedLoss:
    """Cross-entropy of the marked tokens: supervised fine-tuning's loss, and mixture training's."""
    return SummedLoss(cross_entropy(model, micro), micro.mask_T.sum())


def rate_at(learners: Learners, optimizer: OptimizerConfig) -> float:
    """Learning rate of the coming step."""
    return learning_rate_at(
        learners.step,
        peak=optimizer.learning_rate,
        schedule=optimizer.schedule,
        warmup_steps=optimizer.warmup_steps,
        total_steps=learners.total_steps,
        final_fraction=optimizer.final_fraction,
    )


def next_kl_coefficient(
    kl_coefficient: float, collected: Collected, config: PpoConfig, *, iteration: int
) -> float:
    """The penalty's weight for the next rollout: adapted towards `kl_target` if there is one.

    iteration: of the rollout. While the critic warms up the actor is its reference, and a KL of 0 says nothing.
    """
    if config.kl_target is None or not config.trains_actor(iteration):
        return kl_coefficient
    return adaptive_kl_coefficient(
        kl_coefficient,
        collected.kl_nats_per_answer,
        config.kl_target,
        collected.experience.num_sequences,
        config.kl_horizon,
    )


def of_the_rollout(step: StepReport) -> dict[str, float]:
    """What `rollout_stats` says where scoring runs the actor, from the first forward since the rollout."""
    return {
        "ppo/entropy_nats_per_token": step.stats["policy/entropy"],
        "rollout/logprob_gap_mean": step.stats["policy/gap"],
        "rollout/logprob_gap_max": step.maxima["policy/gap"],
        "rollout/mismatch_kl_nats_per_token": step.stats["policy/mismatch_kl"],
    }


def summarise(actor_steps: list[StepReport], critic_steps: list[StepReport]) -> UpdateReport:
    """Means over the steps of one rollout; nothing of the actor while only the critic learns."""
    stats = {
        "ppo/critic_loss": fmean(r.loss for r in critic_steps),
        "ppo/critic_grad_norm": fmean(r.grad_norm for r in critic_steps),
        "ppo/value_clipped_fraction": fmean(r.stats["value/clipped"] for r in critic_steps),
        "ppo/skipped_steps": float(sum(r.skipped for r in [*actor_steps, *critic_steps])),
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
    return UpdateReport(stats.get("ppo/actor_loss", 0.0), stats["ppo/critic_loss"], stats)
