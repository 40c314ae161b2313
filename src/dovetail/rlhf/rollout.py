"""Turn prompts into scored experience for one PPO iteration.

Responsible for: sampling answers, scoring them with actor, reference, critic and reward, shaping the per-token
reward, and the advantages.
Not responsible for: gradients (rlhf/update.py), the equations (maths/), how sampling is fast (engine/).

Shapes: T packed tokens, S sequences (one answer each), A actions (tokens the actor chose).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dovetail.batches import Experience, PackedBatch, Rollout, moved, pack, share_prompts
from dovetail.config.stages import PpoConfig, SamplingConfig
from dovetail.data.records import Message, Prompt
from dovetail.engine.hybrid import HybridEngine
from dovetail.engine.sampling import Sampling
from dovetail.engine.scheduler import Completion
from dovetail.maths.masked import masked_mean, masked_sum, scale_to_unit_std
from dovetail.maths.ppo import (
    clip_scores,
    explained_variance,
    mismatch,
    move_to_turns,
    per_token_rewards,
    replace_missing_end,
)
from dovetail.parallel.shard import sharding_of
from dovetail.parallel.world import ALONE, World, divided
from dovetail.rlhf.algorithms.ppo import rewards_to_come
from dovetail.rlhf.algorithms.protocol import Advantages, Scored, keeping
from dovetail.rlhf.rewards import Answer, episode_stats
from dovetail.rlhf.rewards import Scored as AnswerScores
from dovetail.rlhf.roles import Roles
from dovetail.text.chat_format import ChatFormat
from dovetail.training.step import step_seed


@dataclass(frozen=True, slots=True)
class Collected:
    """One iteration's answers, as text and as experience, with their statistics."""

    answers: list[Answer]
    experience: Experience
    kl_nats_per_answer: float
    stats: dict[str, float]
    sampled_scores_S: Tensor
    """The scores of all answers that were sampled, prompt after prompt; with refills more than in the experience."""


def collect(
    prompts: Sequence[Prompt],
    roles: Roles,
    config: PpoConfig,
    *,
    kl_coefficient: float,
    iteration: int,
    seed: int,
    with_old_logprobs: bool,
) -> Collected:
    """Sample the answers to each prompt and turn them into experience for the update of this iteration (from 0).

    seed: the run's. with_old_logprobs: whether the actor scores the answers in a training forward.
    """
    asked = [prompt for prompt in prompts for _ in range(roles.algorithm.answers_per_prompt)]
    answers = sample_answers(asked, roles, config.sampling, seed=step_seed(seed, iteration))
    return score_answers(
        answers,
        roles,
        config,
        kl_coefficient=kl_coefficient,
        with_old_logprobs=with_old_logprobs,
        shifts_values=iteration == 0,
    )


def score_answers(
    answers: list[Answer],
    roles: Roles,
    config: PpoConfig,
    *,
    kl_coefficient: float,
    with_old_logprobs: bool,
    shifts_values: bool = False,
    answer_scores: AnswerScores | None = None,
) -> Collected:
    """Score the answers with actor, reference, critic and reward, and make them experience to learn from.

    with_old_logprobs: the actor's log-probabilities before the update come from a training forward here, for the
    KL penalty and the ratio alike. Otherwise the penalty takes the generator's, and the update, which may then be
    one step only, its own. Never is a ratio taken to the generator's numbers: with a learning rate of 0 it is 1,
    whatever the generator's kernels round.
    shifts_values: the critic's values are shifted, from here on, so that their mean over these actions is that of the
    rewards to come.
    answer_scores: those of the answers, where the reward was asked before.
    """
    packed = pack_rollout(answers)
    roles.expect_readable(packed)
    rollout = packed.to(roles.device)
    temperature = config.sampling.temperature
    actor = roles.actor_logprobs(rollout, temperature=temperature) if with_old_logprobs else None
    reference_T = roles.reference_logprobs(rollout, temperature=temperature)
    algorithm = roles.algorithm
    values_T = roles.values(rollout) if algorithm.needs_critic else None
    answer_scores = answer_scores or roles.score(answers)
    scores_S = moved(answer_scores.scores_S, roles.device)
    old_T = actor.logprobs_T if actor else None
    penalised_T = rollout.sampled_logprobs_T if old_T is None else old_T
    rewards_T = shape_rewards(
        rollout,
        penalised_T,
        reference_T,
        scores_S,
        config,
        kl_coefficient if algorithm.kl_in_reward else 0.0,
        score_clip=roles.score_clip,
    )
    learnt = keeping(rollout, packed.finished_S) if config.cut_off_answers == "leave_out" else rollout
    if shifts_values and values_T is not None:
        to_come_T = rewards_to_come(learnt, rewards_T, gamma=config.gamma)
        shift = float(masked_mean(to_come_T - values_T, learnt.mask_T))
        roles.value_offset += shift
        values_T = values_T + shift
    scored = Scored(rollout=rollout, learnt=learnt, rewards_T=rewards_T, values_T=values_T)
    advantages = algorithm.advantages(scored, config)
    experience = experience_of(scored, advantages, old_T, reference_T, scores_S)
    entropy_T = actor.entropy_T if actor else None
    stats = rollout_stats(rollout, experience, config, score_clip=roles.score_clip, entropy_T=entropy_T)
    stats["ppo/distinct_fraction"] = len({answer.text for answer in answers}) / len(answers)
    stats["ppo/kl_coefficient"] = kl_coefficient
    stats |= answer_scores.stats
    stats |= advantages.stats
    stats |= episode_stats(answers)
    return Collected(answers, experience, stats["ppo/kl_nats_per_answer"], stats, scores_S)


def sample_answers(
    prompts: Sequence[Prompt],
    roles: Roles,
    sampling: SamplingConfig,
    *,
    seed: int,
    greedy: bool = False,
) -> list[Answer]:
    """Sample one answer to each prompt. Answer i depends on (weights, prompt i, seed, i) alone.

    With an environment each answer is an episode of several turns.
    """
    how = Sampling(
        temperature=0.0 if greedy else sampling.temperature,
        max_new_tokens=sampling.max_new_tokens,
        stop_token_ids=roles.chat.stop_token_ids,
    )
    world = sharding_of(roles.actor).world.everyone
    if roles.environments is not None:
        from dovetail.rlhf.episodes import play  # most runs have no environment

        seeds = request_seeds(seed, len(prompts))
        return play(prompts, seeds, roles.environments, roles.engine, how, context=roles.context, world=world)
    messages = [prompt.messages for prompt in prompts]
    prompt_ids = [roles.chat.prompt_ids(turns) for turns in messages]
    answers = complete(prompt_ids, messages, roles.engine, roles.chat, how, seed=seed, world=world)
    return [replace(answer, row=prompt.row) for answer, prompt in zip(answers, prompts, strict=True)]


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
    seeds = request_seeds(seed, len(prompt_ids))

    def generated(mine: list[int]) -> list[Completion]:
        with engine.generating() as generate:
            return generate(
                [prompt_ids[i] for i in mine], how, seeds=[seeds[i] for i in mine], decode_text=chat.decode
            )

    sizes = [len(ids) + how.max_new_tokens for ids in prompt_ids]
    completions = divided(sizes, generated, world, engine.group)
    return [
        answer_of(messages, ids, completion, chat)
        for messages, ids, completion in zip(prompts, prompt_ids, completions, strict=True)
    ]


def answer_of(
    messages: Sequence[Message], prompt_ids: Sequence[int], completion: Completion, chat: ChatFormat
) -> Answer:
    """Return what the engine drew as an answer, with its text and its prompt."""
    return Answer(
        messages=tuple(messages),
        text=chat.decode(completion.token_ids),
        prompt_ids=tuple(prompt_ids),
        answer_ids=tuple(completion.token_ids),
        logprobs=tuple(completion.logprobs),
        finished=completion.finish_reason == "stop",
    )


def request_seeds(seed: int, count: int) -> list[int]:
    """Return a seed for each request, different for every (seed, index)."""
    return [step_seed(seed, index * 7919 + 17) for index in range(count)]


def pack_rollout(answers: Sequence[Answer]) -> Rollout:
    """Prompts and answers end to end, with the sampled tokens marked as actions.

    Models compute a prompt once for all answers to it that follow one another.
    """
    sequences = [[*a.prompt_ids, *a.answer_ids] for a in answers]
    masks = [[*[False] * len(a.prompt_ids), *a.chosen] for a in answers]
    packed = pack(sequences, masks)
    sampled_A = torch.tensor([p for a in answers for p in a.logprobs], dtype=torch.float32)
    rollout = Rollout(
        token_ids_T=packed.token_ids_T,
        cu_seqlens_S1=packed.cu_seqlens_S1,
        lengths=packed.lengths,
        mask_T=packed.mask_T,
        target_counts=packed.target_counts,
        sampled_logprobs_T=torch.zeros(packed.num_tokens).masked_scatter(packed.mask_T, sampled_A),
        finished_S=torch.tensor([a.finished for a in answers], dtype=torch.bool),
        turn_rewards_T=_turn_rewards_T(answers, packed),
    )
    return share_prompts(rollout, [len(a.prompt_ids) for a in answers])


def _turn_rewards_T(answers: Sequence[Answer], packed: PackedBatch) -> Tensor | None:
    """Return what environments paid, at the last token of each turn; None without an environment."""
    if all(answer.episode is None for answer in answers):
        return None
    rewards_T = torch.zeros(packed.num_tokens)
    for start, answer in zip(packed.cu_seqlens_S1.tolist(), answers, strict=False):
        for place, reward in answer.episode.rewards if answer.episode else ():
            rewards_T[start + len(answer.prompt_ids) + place] = reward
    return rewards_T


def shape_scores(
    scores_S: Tensor, finished_S: Tensor, config: PpoConfig, *, score_clip: float | None
) -> Tensor:
    """Clip the scores [S] and replace those of cut-off answers, if the configuration says so."""
    clipped_S = clip_scores(scores_S, score_clip)
    if config.cut_off_answers != "penalise":
        return clipped_S
    return replace_missing_end(clipped_S, finished_S, config.missing_end_penalty)


def shape_rewards(
    rollout: Rollout,
    logprobs_T: Tensor,
    reference_T: Tensor,
    scores_S: Tensor,
    config: PpoConfig,
    beta: float,
    *,
    score_clip: float | None,
) -> Tensor:
    """Put the shaped score on the last action and subtract the KL penalty at each; float32 [T].

    What an environment paid for a turn is a part of the score, and moves to the last token of that turn.
    """
    shaped_S = shape_scores(scores_S, rollout.finished_S, config, score_clip=score_clip)
    rewards_T = per_token_rewards(
        logprobs_T, reference_T, shaped_S, rollout.mask_T, rollout.last_index_S(), kl_coefficient=beta
    )
    if rollout.turn_rewards_T is not None:
        rewards_T = move_to_turns(
            rewards_T, rollout.turn_rewards_T, rollout.cu_seqlens_S1, rollout.last_index_S()
        )
    return scale_to_unit_std(rewards_T, rollout.mask_T) if config.whiten_rewards else rewards_T


def experience_of(
    scored: Scored,
    advantages: Advantages,
    old_logprobs_T: Tensor | None,
    reference_T: Tensor,
    scores_S: Tensor,
) -> Experience:
    """Put together what the update learns from."""
    learnt = advantages.learnt
    return Experience(
        token_ids_T=learnt.token_ids_T,
        cu_seqlens_S1=learnt.cu_seqlens_S1,
        lengths=learnt.lengths,
        mask_T=learnt.mask_T,
        target_counts=learnt.target_counts,
        shared_lengths=learnt.shared_lengths,
        sampled_logprobs_T=learnt.sampled_logprobs_T,
        old_logprobs_T=old_logprobs_T,
        reference_logprobs_T=reference_T,
        old_values_T=scored.values_T,
        rewards_T=scored.rewards_T,
        advantages_T=advantages.advantages_T,
        returns_T=advantages.returns_T,
        scores_S=scores_S,
        finished_S=learnt.finished_S,
    )


def rollout_stats(
    rollout: Rollout,
    experience: Experience,
    config: PpoConfig,
    *,
    score_clip: float | None,
    entropy_T: Tensor | None,
) -> dict[str, float]:
    """Measure what one looks at first when a run goes wrong; the host waits for the device once.

    rollout: all answers; `experience` marks those that are learnt from. Numbers of a training forward of the actor are
    among them if there was one; else the update, which runs it, reports the same numbers (rlhf/update.py).
    """
    mask_T, num_sequences = rollout.mask_T, rollout.num_sequences
    old_T, sampled_T = experience.old_logprobs_T, rollout.sampled_logprobs_T
    penalised_T = sampled_T if old_T is None else old_T
    penalty_T = (penalised_T - experience.reference_logprobs_T).masked_fill(~mask_T, 0.0)
    scores_S, values_T = experience.scores_S, experience.old_values_T
    kl = penalty_T.sum() / num_sequences
    answer_tokens = mask_T.sum() / num_sequences
    num_learnt = max(1, sum(count > 0 for count in experience.target_counts))
    named = {
        "ppo/score_mean": scores_S.mean(),
        "ppo/score_std": scores_S.std(unbiased=False),
        "ppo/reward_per_answer": masked_sum(experience.rewards_T, experience.mask_T) / num_learnt,
        "ppo/kl_nats_per_answer": kl,
        "ppo/kl_nats_per_token": kl / answer_tokens,
        "ppo/answer_tokens": answer_tokens,
        "ppo/cut_off_fraction": 1.0 - rollout.finished_S.float().mean(),
    }
    if values_T is not None:
        to_come_T = rewards_to_come(experience, experience.rewards_T, gamma=config.gamma)
        named["ppo/value_mean"] = masked_mean(values_T, experience.mask_T)
        named["ppo/explained_variance"] = explained_variance(values_T, to_come_T, experience.mask_T)
    if score_clip is not None:
        named["ppo/score_clipped_fraction"] = (scores_S.abs() > score_clip).float().mean()
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
