"""The prompts of a run in the order in which they are asked, and how far it has come.

Responsible for: the next prompts, however many a rollout asks, so that a resumed run goes on with the one after the
last. Not responsible for: reading prompts (rows.py), answering them (rlhf/).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from dovetail.data.loader import BatchOrder
from dovetail.data.records import Prompt


class PromptQueue:
    """All prompts, epoch after epoch, each epoch in an order of its own that follows from the seed."""

    def __init__(self, prompts: Sequence[Prompt], *, seed: int) -> None:
        self._prompts, self._order = prompts, BatchOrder(len(prompts), 1, seed)
        self._settled = self._reached = 0

    def take(self, count: int) -> list[Prompt]:
        """Return the next prompts."""
        places = range(self._reached, self._reached + count)
        self._reached = places.stop
        return [self._prompts[row] for place in places for row in self._order.batch(place)]

    def settle(self) -> None:
        """Count what was taken as done; a run that resumes asks the rest again."""
        self._settled = self._reached

    def state_dict(self) -> dict[str, Any]:
        """Return the number of prompts that are done."""
        return {"settled": self._settled}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after those prompts."""
        self._settled = self._reached = state["settled"]
