"""Turn prompts into scored experience for one PPO iteration.

Responsible for: sampling answers, scoring them with actor, reference, critic and reward, shaping the per-token
reward, and the advantages.
Not responsible for: gradients (rlhf/update.py), the equations (maths/), how sampling is fast (engine/).

Shapes: T packed tokens, S sequences (one answer each), A actions (tokens the actor chose).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dovetail.batches import Experience, Rollout, moved, pack
from dovetail.config.stages import PpoConfig, SamplingConfig
from dovetail.data.records import Message
from dovetail.engine.answers import Completion
from dovetail.engine.hybrid import HybridEngine
from dovetail.engine.sampling import Sampling
from dovetail.maths.actions import cu_actions
from dovetail.maths.gae import gae
from dovetail.maths.masked import masked_mean, normalise, scale_to_unit_std
from dovetail.maths.mismatch import mismatch
from dovetail.maths.rewards import clip_scores, per_token_rewards, replace_missing_end
from dovetail.maths.value_loss import explained_variance
from dovetail.model.forward import masked_index
from dovetail.parallel.shard import world_of
from dovetail.parallel.share import deal
from dovetail.parallel.world import ALONE, World
from dovetail.rlhf.rewards import Answer
from dovetail.rlhf.roles import Roles
from dovetail.text.chat_format import ChatFormat
from dovetail.training.seeds import step_seed


@dataclass(frozen=True, slots=True)
class Collected:
    """One iteration's answers as text and as experience, with what there is to report about them."""

    answers: list[Answer]
    experience: Experience
    kl_nats_per_answer: float
    stats: dict[str, float]


def collect(
    prompts: Sequence[Sequence[Message]],
    roles: Roles,
    config: PpoConfig,
    *,
    kl_coefficient: float,
    iteration: int,
    seed: int,
) -> Collected:
    """Sample one answer to each prompt and turn them into experience for the update of this iteration (from 0).

    seed: the run's.
    """
    answers = sample_answers(prompts, roles, config.sampling, seed=step_seed(seed, iteration))
    with_old = config.needs_old_logprobs(iteration)
    return score_answers(answers, roles, config, kl_coefficient=kl_coefficient, with_old_logprobs=with_old)


def score_answers(
    answers: list[Answer],
    roles: Roles,
    config: PpoConfig,
    *,
    kl_coefficient: float,
    with_old_logprobs: bool,
) -> Collected:
    """What actor, reference, critic and reward say of the answers, as experience to learn from.

    with_old_logprobs: the actor's log-probabilities before the update come from a training forward here, for the
    KL penalty and the ratio alike. Otherwise the penalty takes the generator's, and the update, which may then be
    one step only, its own. Never is a ratio taken to the generator's numbers: with a learning rate of 0 it is 1,
    whatever the generator's kernels round.
    """
    rollout = pack_rollout(answers)
    roles.expect_readable(rollout)
    rollout = rollout.to(roles.device)
    temperature = config.sampling.temperature
    actor = roles.actor_logprobs(rollout, temperature=temperature) if with_old_logprobs else None
    reference_T = roles.reference_logprobs(rollout, temperature=temperature)
    values_T = roles.values(rollout)
    scores_S = moved(roles.score(answers), roles.device)
    old_T = actor.logprobs_T if actor else None
    penalised_T = rollout.sampled_logprobs_T if old_T is None else old_T
    rewards_T = shape_rewards(rollout, penalised_T, reference_T, scores_S, config, kl_coefficient)
    experience = with_advantages(rollout, old_T, reference_T, values_T, rewards_T, scores_S, config)
    stats = rollout_stats(experience, actor.entropy_T if actor else None)
    return Collected(answers, experience, stats["ppo/kl_nats_per_answer"], stats)


def sample_answers(
    prompts: Sequence[Sequence[Message]],
    roles: Roles,
    sampling: SamplingConfig,
    *,
    seed: int,
    greedy: bool = False,
) -> list[Answer]:
    """One answer to each prompt. Answer i depends on (weights, prompt i, seed, i) alone."""
    prompt_ids = [roles.chat.prompt_ids(messages) for messages in prompts]
    how = Sampling(
        temperature=0.0 if greedy else sampling.temperature,
        max_new_tokens=sampling.max_new_tokens,
        stop_token_ids=roles.chat.stop_token_ids,
    )
    world = world_of(roles.actor).everyone
    return complete(prompt_ids, prompts, roles.engine, roles.chat, how, seed=seed, world=world)


def complete(
    prompt_ids: Sequence[Sequence[int]],
    prompts: Sequence[Sequence[Message]],
    engine: HybridEngine,
    chat: ChatFormat,
    how: Sampling,
    *,
    seed: int,
    world: World = ALONE,
) -> list[Answer]:
    """Generate and decode one answer to each tokenised prompt; the processes of `world` that hold one model together
    answer a share.
    """
    seeds, together = request_seeds(seed, len(prompt_ids)), engine.group.size
    shares = deal([len(ids) + how.max_new_tokens for ids in prompt_ids], world.size // together)
    mine = shares[world.rank // together]
    with engine.generating() as generate:
        own = generate([prompt_ids[i] for i in mine], how, seeds=[seeds[i] for i in mine])
    everybodys = zip(shares, world.gather(own if engine.group.is_first else [])[::together], strict=True)
    found = {i: completion for share, part in everybodys for i, completion in zip(share, part, strict=True)}
    completions = [found[i] for i in range(len(prompt_ids))]
    return [
        answer_of(messages, ids, completion, chat)
        for messages, ids, completion in zip(prompts, prompt_ids, completions, strict=True)
    ]


def answer_of(
    messages: Sequence[Message], prompt_ids: Sequence[int], completion: Completion, chat: ChatFormat
) -> Answer:
    """What the engine drew, with its text and what it answers."""
    return Answer(
        messages=tuple(messages),
        text=chat.decode(completion.token_ids),
        prompt_ids=tuple(prompt_ids),
        answer_ids=tuple(completion.token_ids),
        logprobs=tuple(completion.logprobs),
        finished=completion.finish_reason == "stop",
    )


def request_seeds(seed: int, count: int) -> list[int]:
    """A seed for each request, different for every (seed, index)."""
    return [step_seed(seed, index * 7919 + 17) % (2**63 - 1) for index in range(count)]


def pack_rollout(answers: Sequence[Answer]) -> Rollout:
    """Prompts and answers end to end, with the sampled tokens marked as actions."""
    sequences = [[*a.prompt_ids, *a.answer_ids] for a in answers]
    masks = [[False] * len(a.prompt_ids) + [True] * len(a.answer_ids) for a in answers]
    packed = pack(sequences, masks)
    sampled_A = torch.tensor([p for a in answers for p in a.logprobs], dtype=torch.float32)
    return Rollout(
        token_ids_T=packed.token_ids_T,
        cu_seqlens_S1=packed.cu_seqlens_S1,
        lengths=packed.lengths,
        mask_T=packed.mask_T,
        target_counts=packed.target_counts,
        sampled_logprobs_T=torch.zeros(packed.num_tokens).masked_scatter(packed.mask_T, sampled_A),
        finished_S=torch.tensor([a.finished for a in answers], dtype=torch.bool),
    )


def shape_rewards(
    rollout: Rollout,
    logprobs_T: Tensor,
    reference_T: Tensor,
    scores_S: Tensor,
    config: PpoConfig,
    beta: float,
) -> Tensor:
    """Score (clipped; replaced where the answer never ended) at the last action, minus the KL penalty per token."""
    clipped_S = clip_scores(scores_S, config.score_clip)
    clipped_S = replace_missing_end(clipped_S, rollout.finished_S, config.missing_end_penalty)
    rewards_T = per_token_rewards(
        logprobs_T, reference_T, clipped_S, rollout.mask_T, rollout.last_index_S(), kl_coefficient=beta
    )
    return scale_to_unit_std(rewards_T, rollout.mask_T) if config.whiten_rewards else rewards_T


def with_advantages(
    rollout: Rollout,
    old_logprobs_T: Tensor | None,
    reference_T: Tensor,
    values_T: Tensor,
    rewards_T: Tensor,
    scores_S: Tensor,
    config: PpoConfig,
) -> Experience:
    """GAE over the actions alone, the critic's targets, and advantages normalised over the whole rollout."""
    mask_T, index_A = rollout.mask_T, masked_index(rollout)
    advantages_A = gae(
        rewards_T.index_select(0, index_A),
        values_T.index_select(0, index_A),
        cu_actions(mask_T, rollout.cu_seqlens_S1),
        gamma=config.gamma,
        lam=config.gae_lambda,
        longest=max(rollout.target_counts),
    )
    advantages_T = advantages_A.new_zeros(rollout.num_tokens).index_copy(0, index_A, advantages_A)
    return Experience(
        token_ids_T=rollout.token_ids_T,
        cu_seqlens_S1=rollout.cu_seqlens_S1,
        lengths=rollout.lengths,
        mask_T=mask_T,
        target_counts=rollout.target_counts,
        sampled_logprobs_T=rollout.sampled_logprobs_T,
        old_logprobs_T=old_logprobs_T,
        reference_logprobs_T=reference_T,
        old_values_T=values_T,
        rewards_T=rewards_T,
        advantages_T=normalise(advantages_T, mask_T),
        returns_T=(advantages_T + values_T).masked_fill(~mask_T, 0.0),
        scores_S=scores_S,
        finished_S=rollout.finished_S,
    )


def rollout_stats(experience: Experience, entropy_T: Tensor | None) -> dict[str, float]:
    """What one looks at first when a run goes wrong; one wait for the device.

    What a training forward of the actor says of the rollout is among it if there was one; else the update, which
    runs it, reports the same numbers (rlhf/update.py).
    """
    mask_T, num_sequences = experience.mask_T, experience.num_sequences
    old_T, sampled_T = experience.old_logprobs_T, experience.sampled_logprobs_T
    penalised_T = sampled_T if old_T is None else old_T
    penalty_T = (penalised_T - experience.reference_logprobs_T).masked_fill(~mask_T, 0.0)
    named = {
        "ppo/score_mean": experience.scores_S.mean(),
        "ppo/score_std": experience.scores_S.std(unbiased=False),
        "ppo/reward_per_answer": experience.rewards_T.sum() / num_sequences,
        "ppo/kl_nats_per_answer": penalty_T.sum() / num_sequences,
        "ppo/answer_tokens": mask_T.sum() / num_sequences,
        "ppo/cut_off_fraction": 1.0 - experience.finished_S.float().mean(),
        "ppo/value_mean": masked_mean(experience.old_values_T, mask_T),
        "ppo/explained_variance": explained_variance(experience.old_values_T, experience.returns_T, mask_T),
    }
    if old_T is not None:
        gap = mismatch(old_T, sampled_T, mask_T)
        named |= {
            "rollout/logprob_gap_mean": gap.gap_sum / mask_T.sum(),
            "rollout/logprob_gap_max": gap.gap_max,
            "rollout/mismatch_kl_nats_per_token": gap.kl_sum / mask_T.sum(),
        }
    if entropy_T is not None:
        named["ppo/entropy_nats_per_token"] = masked_mean(entropy_T, mask_T)
    numbers = torch.stack([value.float() for value in named.values()]).tolist()
    return dict(zip(named, numbers, strict=True))
