"""The prompts of a run in the order in which they are asked, and how far it has come.

Responsible for: the next prompts, however many a rollout asks, so that a resumed run goes on with the one after the
last; a curriculum that asks prompts less often whose answers nearly all pass, or nearly none.
Not responsible for: reading prompts (rows.py), answering them (rlhf/).

With a pass rate p the reward of one answer has the variance p (1 - p), which is what a method can learn from. So a
prompt's turn is used with the chance 4 p (1 - p), at least LEAST, and passes to the next prompt otherwise. p is
estimated as (passed + 1) / (answered + 2) over the answers so far, which count half as much each time that the prompt
is asked again, because the actor changes.

Shapes: S answers.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from dovetail.data.loader import BatchOrder
from dovetail.data.records import Prompt

LEAST = 0.1
"""The chance of a prompt whose answers all pass, or none."""


class PromptQueue:
    """All prompts, epoch after epoch, each epoch in an order of its own that follows from the seed.

    pass_score: the score from which an answer passes, for the curriculum; None = all prompts are asked alike.
    """

    def __init__(self, prompts: Sequence[Prompt], *, seed: int, pass_score: float | None = None) -> None:
        self._prompts, self._order = prompts, BatchOrder(len(prompts), 1, seed)
        self._seed, self._pass_score = seed, pass_score
        self._settled = self._reached = 0
        self._taken: list[int] = []
        self._passed: dict[int, float] = {}
        self._answered: dict[int, float] = {}

    def take(self, count: int) -> list[Prompt]:
        """Return the next prompts."""
        before = len(self._taken)
        while len(self._taken) < before + count:
            [row] = self._order.batch(self._reached)
            if np.random.default_rng([self._seed, 1, self._reached]).random() < self.chance(row):
                self._taken.append(row)
            self._reached += 1
        return [self._prompts[row] for row in self._taken[before:]]

    def chance(self, row: int) -> float:
        """Return with what chance a prompt is asked when its turn comes."""
        rate = (self._passed.get(row, 0.0) + 1) / (self._answered.get(row, 0.0) + 2)
        return max(LEAST, 4 * rate * (1 - rate))

    def settle(self, scores_S: Tensor) -> dict[str, float]:
        """Count what was taken as done, and return what the log says of it; a run that resumes asks the rest again.

        scores_S: of the answers to all prompts that were taken, prompt after prompt.
        """
        turns, taken = self._reached - self._settled, self._taken
        self._settled, self._taken = self._reached, []
        if self._pass_score is None:
            return {}
        passed = (scores_S >= self._pass_score).view(len(taken), -1).float()
        for row, own in zip(taken, passed.tolist(), strict=True):
            self._passed[row] = self._passed.get(row, 0.0) / 2 + sum(own)
            self._answered[row] = self._answered.get(row, 0.0) / 2 + len(own)
        return {"ppo/pass_rate": float(passed.mean()), "ppo/turns_passed_over": float(turns - len(taken))}

    def state_dict(self) -> dict[str, Any]:
        """Return the turns that are done, and what the curriculum knows of each prompt."""
        known = [[row, self._passed[row], self._answered[row]] for row in sorted(self._passed)]
        return {"settled": self._settled, "known": known}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after those turns."""
        self._settled = self._reached = state["settled"]
        self._passed = {row: passed for row, passed, _ in state["known"]}
        self._answered = {row: answered for row, _, answered in state["known"]}
