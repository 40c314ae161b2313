"""Prompts with right and wrong answers, told apart by a verifier or a function of the user's.

Responsible for: the share of right answers, and pass@k of several. Not responsible for: the verifiers (verifiers/),
answers that a function fails on (reward_functions.py).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev

from dovetail.data.records import Prompt
from dovetail.errors import ConfigError
from dovetail.maths.evaluation import pass_at_k, wilson_interval
from dovetail.parallel.shard import sharding_of
from dovetail.rlhf.rewards import FirstRankScorer, Scorer
from dovetail.rlhf.tasks.subject import Drawing, Subject

RIGHT = 0.5
"""The score above which an answer is right."""


@dataclass(frozen=True, slots=True)
class Verified:
    """Accuracy of greedy answers; pass@k where several are drawn for each prompt."""

    label: str
    prompts: Sequence[Prompt]
    scorer: Scorer
    drawing: Drawing

    def __len__(self) -> int:
        return len(self.prompts)

    def __call__(self, subject: Subject) -> dict[str, float]:
        samples = self.drawing.samples
        asked = [prompt for prompt in self.prompts for _ in range(samples)]
        answers = subject.answers(asked, self.drawing, greedy=samples == 1)
        scorer = FirstRankScorer(self.scorer, sharding_of(subject.model).world.everyone)
        try:
            is_right = (scorer(answers).scores_S > RIGHT).tolist()
        except ConfigError as error:
            raise ConfigError(f"the task {self.label}: {error.message}", hint=error.hint) from error
        return figures([sum(is_right[i : i + samples]) for i in range(0, len(asked), samples)], samples)


def figures(num_right: Sequence[int], samples: int) -> dict[str, float]:
    """Return the accuracy where one answer was drawn for each prompt, else pass@k for k = 1, 2, 4 ... up to all.

    num_right: how many answers to each prompt were right.
    """
    if samples == 1:
        low, high = wilson_interval(sum(num_right), len(num_right))
        return {"accuracy": fmean(num_right), "accuracy_low": low, "accuracy_high": high}
    found: dict[str, float] = {}
    for k in [*(2**power for power in range(math.ceil(math.log2(samples)))), samples]:
        passed = [pass_at_k(samples, right, k) for right in num_right]
        found |= {f"pass_at_{k}": fmean(passed), f"pass_at_{k}_stderr": pstdev(passed) / len(passed) ** 0.5}
    return found
