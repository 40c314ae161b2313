"""Tell of a finished stage what its results are, and warn of those that cannot be right.

Responsible for: the line of results at the end of a stage, and warnings about its losses and its accuracy.
Not responsible for: measuring (evaluation/), what goes wrong in a PPO rollout (guard.py).
"""

import math
from collections.abc import Iterator, Mapping

from dovetail.telemetry.log import warn

ABSURD_LOSS = 100.0
"""Nats per token or pair. A model that knows nothing has log(vocabulary), about 12, or log(2)."""
ABSURD_CRITIC_LOSS = 10_000.0
"""Squared units of the score, which a reward function chooses."""


def shown(results: Mapping[str, float]) -> str:
    """Return the results of a stage as one line."""
    listed = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in results.items())
    return listed or "no rows are held out, so nothing is known of its quality"


def doubts_of(results: Mapping[str, float]) -> Iterator[str]:
    """Yield what speaks against the results of a finished stage."""
    for name, value in results.items():
        if is_absurd(name, value):
            yield f"{name} is {value:.4g}: the stage has learnt nothing that is of use"
    accuracy, pairs = results.get("accuracy"), results.get("held_out_pairs", 0.0)
    if accuracy is None or not pairs:
        return
    two_errors = 1 / math.sqrt(pairs)
    on = f"accuracy {accuracy:.3f} on {pairs:.0f} held-out pairs is"
    if accuracy < 0.5 - two_errors:
        yield f"{on} worse than guessing: the model prefers what people rejected; are the columns swapped?"
    elif accuracy < 0.5 + two_errors:
        yield (
            f"{on} not to be told from guessing (0.5, give or take {two_errors:.3f}): it may have learnt noise alone. "
            "See with `dovetail data preview --stage reward` whether the better answers stand where they should; give "
            "more comparisons, or train longer"
        )


def is_absurd(name: str, value: float) -> bool:
    """Return whether a number of this name is a loss that no sound training has."""
    if not name.endswith("loss"):
        return False
    return not abs(value) < (ABSURD_CRITIC_LOSS if name.endswith("critic_loss") else ABSURD_LOSS)


class LossWatch:
    """The watch over the losses of a stage's steps, which warns once for each kind of loss."""

    def __init__(self) -> None:
        self._warned: set[str] = set()

    def see(self, row: Mapping[str, float], *, step: int) -> None:
        """Warn of a loss in a row of metrics that is out of all proportion."""
        for name in row.keys() - self._warned:
            if is_absurd(name, row[name]):
                self._warned.add(name)
                warn(
                    f"{name} is {row[name]:.4g} at step {step}, where a model that knows nothing has a few units",
                    hint="lower the learning rate, and look at the rows with `dovetail data preview`; a model with "
                    "damaged weights begins like this, too",
                )
