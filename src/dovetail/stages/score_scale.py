"""Put scores on the scale of the answers that the actor gives before it learns.

Responsible for: mean and deviation of the scores of those answers, measured once and kept in the checkpoint.
Not responsible for: the scores themselves (rlhf/rewards.py), clipping them (rlhf/rollout.py).

A reward model is fitted to differences, so its zero and its unit mean nothing, and no KL coefficient and no score clip
suits all of them. Ziegler et al. 2019 (arXiv:1909.08593), section 2, give its scores mean 0 and variance 1 over answers
of the model that training begins with.

Shapes: S answers.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from dovetail.data.records import Prompt
from dovetail.rlhf.api import RLHFEngine
from dovetail.rlhf.rewards import Answer, Scored
from dovetail.telemetry.log import say, warn

MOST_PROMPTS = 256
"""Prompts whose answers are measured."""


class ScoreScale:
    """Scores less a mean, in units of a deviation; it takes the place of the engine's scorer if it is on."""

    def __init__(self, engine: RLHFEngine, *, is_on: bool) -> None:
        self._engine, self._score, self._is_on = engine, engine.roles.score, is_on
        self.mean, self.deviation = 0.0, 1.0
        self._is_known = False
        if is_on:
            engine.roles.score = self

    def __call__(self, answers: Sequence[Answer]) -> Scored:
        """Return the scores on this scale."""
        scored = self._score(answers)
        stats = {**scored.stats, "reward/unscaled_mean": float(scored.scores_S.mean())}
        return Scored((scored.scores_S - self.mean) / self.deviation, stats)

    def measure(self, prompts: Sequence[Prompt]) -> None:
        """Take mean and deviation of the scores of the actor's answers, unless they are known or the scale is off.

        Answers that were cut off do not count, as long as others ended: their scores are replaced in any case.
        """
        if self._is_known or not self._is_on:
            return
        answers = self._engine.generate(prompts[:MOST_PROMPTS], seed=self._engine.setup.seed)
        ended = [answer for answer in answers if answer.finished] or answers
        scores_S: Tensor = self._score(ended).scores_S.double()
        self.mean, deviation = float(scores_S.mean()), float(scores_S.std(unbiased=False))
        self._is_known = True
        if deviation > 0:
            self.deviation = deviation
        else:
            warn(
                f"all {len(ended)} answers before training have the score {self.mean:g}: no unit to divide scores by"
            )
        say(
            f"scores count less {self.mean:.4g}, in units of {self.deviation:.4g}, as of {len(ended)} answers"
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the scale."""
        return {"mean": self.mean, "deviation": self.deviation, "is_known": self._is_known}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with that scale."""
        self.mean, self.deviation, self._is_known = state["mean"], state["deviation"], state["is_known"]
