"""Answers to prompts that have no right answer: their figures, their scores, and the comparison of two models' answers.

Responsible for: sampling, scoring by reward models, the KL to another model, the win rate of one model over another.
Not responsible for: the figures (rlhf/evaluation.py), what a judge is asked (rlhf/judge.py).

Shapes: S answers.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from dovetail.data.records import Prompt
from dovetail.errors import ConfigError
from dovetail.maths.evaluation import wilson_interval
from dovetail.maths.ranking import won_pairs
from dovetail.rlhf.attempts import Failure, attempt
from dovetail.rlhf.build import same_tokens
from dovetail.rlhf.evaluation import answer_figures, standard_error
from dovetail.rlhf.judge import Referee
from dovetail.rlhf.rewards import Answer, RewardModelScorer
from dovetail.rlhf.rollout import pack_rollout
from dovetail.rlhf.tasks.pairs import RewardModel
from dovetail.rlhf.tasks.subject import Drawing, Subject
from dovetail.telemetry.log import warn

_JUDGED_AT_ONCE = 16

Verdicts = Callable[[Sequence[Answer], Sequence[Answer]], Tensor]
"""A judge of answers to the same prompts: float32 [S], 1 where the first is better, 1/2 for a tie, else 0; NaN where
there is no verdict."""


@dataclass(frozen=True, slots=True)
class Answered:
    """The answers of a model with their scores and figures."""

    answers: Sequence[Answer]
    scores: Mapping[str, Tensor]
    """float32 [S] of each reward model, by its name."""
    figures: Mapping[str, float]


def answer_prompts(
    prompts: Sequence[Prompt],
    subject: Subject,
    drawing: Drawing,
    *,
    reward_models: Mapping[str, RewardModel],
    reference: Subject | None,
) -> Answered:
    """Sample one answer to each prompt and measure it; `reference` has the tokens of `subject`, or is None."""
    answers = subject.answers(prompts, drawing)
    batch = pack_rollout(answers).to(subject.device)
    temperature = drawing.temperature
    reference_T = None if reference is None else reference.logprobs(batch, temperature=temperature).logprobs_T
    figures = answer_figures(answers, batch, subject.logprobs(batch, temperature=temperature), reference_T)
    scores = {name: scores_of(answers, subject, model) for name, model in reward_models.items()}
    rewards: dict[str, float] = {}
    for name, scores_S in scores.items():
        rewards[name] = float(scores_S.mean())
        rewards[f"{name}_stderr"] = standard_error(scores_S)
    return Answered(answers, scores, rewards | figures)


def scores_of(answers: Sequence[Answer], subject: Subject, reward_model: RewardModel) -> Tensor:
    """float32 [S]: the reward of each answer, as text where the reward model has other tokens."""
    own_chat = None if same_tokens(subject.chat, reward_model.chat) else reward_model.chat
    scorer = RewardModelScorer(reward_model.model, reward_model.budget, reward_model.device, own_chat)
    return scorer(answers).scores_S.cpu()


def wins(one: Answered, other: Answered, judge: Verdicts | None) -> dict[str, float]:
    """Return the share of prompts on which the answer of `one` is better, ties counting half, by each reward model and
    by the judge, with intervals of 95 %."""
    found = {name: won_pairs(one.scores[name], other.scores[name]) for name in one.scores}
    if judge is not None:
        found["judge"] = judge(one.answers, other.answers)
    rates: dict[str, float] = {}
    for name, verdict_S in found.items():
        given_S = verdict_S[~torch.isnan(verdict_S)]
        low, high = wilson_interval(float(given_S.sum()), len(given_S))
        rates |= {f"{name}_wins": float(given_S.mean()), f"{name}_wins_low": low, f"{name}_wins_high": high}
    return rates


def verdicts(judge: Referee, ones: Sequence[Answer], others: Sequence[Answer]) -> Tensor:
    """float32 [S]: the judge's verdict on each pair of answers, NaN where it gives none.

    Raises ConfigError if it gives none on the first pair, or on any.
    """

    def verdict(pair: tuple[Answer, Answer]) -> float | Failure:
        return attempt(lambda: judge(pair[0].messages, pair[0].text, pair[1].text), 4 * judge.seconds)

    pairs = list(zip(ones, others, strict=True))
    first = verdict(pairs[0])
    if isinstance(first, Failure):
        raise ConfigError(
            f"the judge {judge.model} at {judge.url} gives no verdict: it {first.reason}",
            hint="check the address (it ends in /v1), the name of the model and the key in OPENAI_API_KEY",
        )
    with ThreadPoolExecutor(_JUDGED_AT_ONCE) as threads:
        found = [first, *threads.map(verdict, pairs[1:])]
    failures = [one for one in found if isinstance(one, Failure)]
    if failures:
        warn(
            f"the judge gave no verdict on {len(failures)} of {len(found)} pairs, which are left out; on the first of "
            f"them it {failures[0].reason}"
        )
    return torch.tensor([float("nan") if isinstance(one, Failure) else one for one in found])
