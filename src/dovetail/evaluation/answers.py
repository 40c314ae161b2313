"""What the actor answers to held-out prompts, and what that is worth.

Responsible for: mean reward, KL to the reference, length and endings over held-out prompts, always with the same
seeds, so that two evaluations differ by the weights alone.
Not responsible for: training (stages/ppo.py).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from dovetail.data.records import Message
from dovetail.rlhf.api import RLHFEngine
from dovetail.rlhf.rewards import Answer

EVALUATION_SEED = 20_220_304

Judge = Callable[[Sequence[Answer]], Mapping[str, float]]
"""A second opinion, such as a gold score: names and numbers."""


@dataclass(frozen=True, slots=True)
class Judged:
    """Answers to the held-out prompts and what there is to say of them."""

    answers: list[Answer]
    scores: list[float]
    stats: dict[str, float]


def evaluate_answers(
    prompts: Sequence[Sequence[Message]], engine: RLHFEngine, judge: Judge | None = None
) -> Judged:
    """Sample one answer to each held-out prompt and score it. Without prompts there is nothing to say."""
    if not prompts:
        return Judged([], [], {})
    answers = engine.generate(prompts, seed=EVALUATION_SEED)
    batch = engine.pack(answers)
    gap_T = engine.logprobs(batch) - engine.reference_logprobs(batch)
    scores_S = engine.rewards(answers).float().cpu()
    stats = {
        "ppo/held_out_reward": float(scores_S.mean()),
        "ppo/held_out_reward_stderr": float(scores_S.std(unbiased=False)) / len(answers) ** 0.5,
        "ppo/held_out_kl_nats_per_answer": float(gap_T.sum()) / len(answers),
        "ppo/held_out_answer_tokens": batch.num_targets / len(answers),
        "ppo/held_out_cut_off_fraction": 1.0
        - float(torch.tensor([a.finished for a in answers]).float().mean()),
    }
    if judge is not None:
        stats |= {f"ppo/{name}": value for name, value in judge(answers).items()}
    return Judged(answers, scores_S.tolist(), stats)
