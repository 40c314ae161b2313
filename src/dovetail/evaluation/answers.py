"""Judge the actor by its answers to held-out prompts.

Responsible for: objective, mean reward, KL to the reference, length and endings over held-out prompts, always with the
same seeds, so that two evaluations differ by the weights alone.
Not responsible for: training (stages/ppo.py).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from dovetail.maths.masked import masked_mean
from dovetail.rlhf.api import Conversation, RLHFEngine
from dovetail.rlhf.rewards import Answer
from dovetail.rlhf.rollout import shape_scores

EVALUATION_SEED = 20_220_304

Judge = Callable[[Sequence[Answer]], Mapping[str, float]]
"""A second opinion, such as a gold score: names and numbers."""


@dataclass(frozen=True, slots=True)
class Judged:
    """Answers to the held-out prompts with their scores and statistics."""

    answers: list[Answer]
    scores: list[float]
    stats: dict[str, float]


def evaluate_answers(
    prompts: Sequence[Conversation], engine: RLHFEngine, judge: Judge | None = None
) -> Judged:
    """Sample one answer to each held-out prompt and score it; without prompts the result is empty.

    `held_out_objective` is what training raises: the mean score as PPO counts it, less `kl_coefficient` (the setting,
    also where a controller moves the penalty of training, so that evaluations stay comparable) times the KL.
    `held_out_reward` is the mean of the scores as they came.
    """
    if not prompts:
        return Judged([], [], {})
    answers = engine.generate(prompts, seed=EVALUATION_SEED)
    batch, config, roles = engine.pack(answers), engine.config, engine.roles
    actor = roles.actor_logprobs(batch, temperature=config.sampling.temperature)
    assert actor.entropy_T is not None
    gap_T = (actor.logprobs_T - engine.reference_logprobs(batch)).masked_fill(~batch.mask_T, 0.0)
    scores_S = engine.rewards(answers).float()
    shaped_S = shape_scores(scores_S, batch.finished_S, config, score_clip=roles.score_clip)
    kl = float(gap_T.sum()) / len(answers)
    stats = {
        "ppo/held_out_objective": float(shaped_S.mean()) - config.kl_coefficient * kl,
        "ppo/held_out_reward": float(scores_S.mean()),
        "ppo/held_out_reward_stderr": float(scores_S.std(unbiased=False)) / len(answers) ** 0.5,
        "ppo/held_out_kl_nats_per_answer": kl,
        "ppo/held_out_entropy_nats_per_token": float(masked_mean(actor.entropy_T, batch.mask_T)),
        "ppo/held_out_distinct_fraction": len({answer.text for answer in answers}) / len(answers),
        "ppo/held_out_answer_tokens": batch.num_targets / len(answers),
        "ppo/held_out_cut_off_fraction": 1.0 - float(batch.finished_S.float().mean()),
    }
    if judge is not None:
        stats |= {f"ppo/{name}": value for name, value in judge(answers).items()}
    return Judged(answers, scores_S.tolist(), stats)
