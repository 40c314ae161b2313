"""Ask further prompts in the place of those that teach nothing, until a rollout is full (DAPO's dynamic sampling).

Yu et al. 2025 (arXiv:2503.14476), section 3.2: where all answers to a prompt have the same reward their advantages are
0, so the more of the prompts are too easy or too hard, the less a rollout has to learn from.

Responsible for: the rounds of sampling and scoring. Not responsible for: what a method learns from (algorithms/), the
models' forward passes over the rollout (rollout.py), which prompts come next (stages/prompt_queue.py).

Shapes: S answers.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dovetail.config.stages import PpoConfig
from dovetail.data.records import Prompt
from dovetail.rlhf.algorithms.protocol import Scored, keeping
from dovetail.rlhf.rewards import Answer
from dovetail.rlhf.rewards import Scored as AnswerScores
from dovetail.rlhf.roles import Roles
from dovetail.rlhf.rollout import (
    Collected,
    pack_rollout,
    request_seeds,
    sample_answers,
    score_answers,
    shape_rewards,
)
from dovetail.training.step import step_seed


def collect_full(  # noqa: PLR0913 -- the arguments of `collect`, and where further prompts come from
    prompts: Sequence[Prompt],
    roles: Roles,
    config: PpoConfig,
    *,
    more: Callable[[int], Sequence[Prompt]],
    kl_coefficient: float,
    iteration: int,
    seed: int,
    with_old_logprobs: bool,
) -> Collected:
    """Do as `rollout.collect`, but ask as many further prompts as there are that nothing would be learnt from.

    more: gives so many prompts. What is still missing after `refill_rounds` rounds is filled with prompts that teach
    nothing. What is reported of scores is the first round's, which nobody selected.
    """
    size = roles.algorithm.answers_per_prompt
    answers: list[Answer] = []
    scores: list[AnswerScores] = []
    teaching: list[bool] = []
    asked, rounds = prompts, 0
    while True:
        new, found = _sampled(asked, roles, config, seed=step_seed(seed, iteration), num_before=len(answers))
        answers += new
        scores.append(found)
        teaching += teaches(new, found.scores_S, roles, config)
        num_missing = len(prompts) - sum(teaching)
        if not num_missing or rounds == roles.algorithm.refill_rounds:
            break
        asked, rounds = more(num_missing), rounds + 1
    best_first = sorted(range(len(teaching)), key=lambda group: not teaching[group])
    index = [group * size + i for group in sorted(best_first[: len(prompts)]) for i in range(size)]
    sampled_S = torch.cat([part.scores_S for part in scores])
    collected = score_answers(
        [answers[i] for i in index],
        roles,
        config,
        kl_coefficient=kl_coefficient,
        with_old_logprobs=with_old_logprobs,
        answer_scores=AnswerScores(sampled_S[index], scores[0].stats),
    )
    stats = {
        "ppo/score_mean": float(scores[0].scores_S.mean()),
        "ppo/score_std": float(scores[0].scores_S.std(unbiased=False)),
        "ppo/refill_rounds": float(rounds),
        "ppo/prompts_asked": float(len(teaching)),
        "ppo/unfilled_fraction": num_missing / len(prompts),
    }
    return replace(collected, stats=collected.stats | stats, sampled_scores_S=sampled_S)


def _sampled(
    prompts: Sequence[Prompt], roles: Roles, config: PpoConfig, *, seed: int, num_before: int
) -> tuple[list[Answer], AnswerScores]:
    """Sample and score the answers to each prompt, after `num_before` others of the rollout."""
    asked = [prompt for prompt in prompts for _ in range(roles.algorithm.answers_per_prompt)]
    # The seed of the answer that would come next is no other answer's, so a round may begin with it.
    own_seed = request_seeds(seed, num_before + 1)[-1] if num_before else seed
    answers = sample_answers(asked, roles, config.sampling, seed=own_seed)
    return answers, roles.score(answers)


def teaches(answers: Sequence[Answer], scores_S: Tensor, roles: Roles, config: PpoConfig) -> list[bool]:
    """Return for each prompt whether the method learns from any of its answers, judged by their scores alone."""
    packed, size = pack_rollout(answers), roles.algorithm.answers_per_prompt
    no_penalty_T = torch.zeros(packed.num_tokens)
    rewards_T = shape_rewards(
        packed, no_penalty_T, no_penalty_T, scores_S.cpu(), config, 0.0, score_clip=roles.score_clip
    )
    learnt = keeping(packed, packed.finished_S) if config.cut_off_answers == "leave_out" else packed
    scored = Scored(rollout=packed, learnt=learnt, rewards_T=rewards_T, values_T=None)
    counts = roles.algorithm.advantages(scored, config).learnt.target_counts
    return [any(counts[start : start + size]) for start in range(0, len(counts), size)]
