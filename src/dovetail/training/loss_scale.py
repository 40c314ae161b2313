"""Dynamic loss scaling for fp16 (Micikevicius et al. 2018, arXiv:1710.03740, section 3.2).

Responsible for: the scale. Not responsible for: multiplying and dividing by it (training/step.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(slots=True)
class LossScaler:
    """The loss is multiplied by `scale` so that small fp16 gradients do not vanish; always a power of two."""

    scale: float = 2.0**16
    growth_interval: int = 2000
    """Finite steps in a row after which the scale doubles."""
    finite_in_a_row: int = 0

    def record_finite(self) -> None:
        """Record a step that was taken."""
        self.finite_in_a_row += 1
        if self.finite_in_a_row >= self.growth_interval:
            self.scale *= 2.0
            self.finite_in_a_row = 0

    def record_overflow(self) -> bool:
        """Halve the scale after an overflow; returns False if it is 1 already, so that scaling is not to blame."""
        self.finite_in_a_row = 0
        if self.scale <= 1.0:
            return False
        self.scale /= 2.0
        return True

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"scale": self.scale, "finite_in_a_row": self.finite_in_a_row}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`."""
        self.scale = float(state["scale"])
        self.finite_in_a_row = int(state["finite_in_a_row"])
