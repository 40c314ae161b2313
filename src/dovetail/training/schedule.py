"""The learning rate of each optimiser step.

Responsible for: warm-up and decay, as a pure function of the step. Nothing to save, nothing to resume.
"""

import math
from typing import Literal


def learning_rate_at(
    step: int,
    *,
    peak: float,
    schedule: Literal["cosine", "linear", "constant"],
    warmup_steps: int,
    total_steps: int,
    final_fraction: float,
) -> float:
    """Return the rate of optimiser step `step`, counted from 0.

    Warm-up: peak * (step + 1) / warmup_steps, so that no step is spent on a rate of 0 and the last warm-up
    step reaches the peak. After it, with x = (step - warmup_steps) / (total_steps - warmup_steps) in [0,
    1]: linear 1 - x, cosine (1 + cos(pi x)) / 2, constant 1, mapped from [0, 1] to [final_fraction, 1] of
    the peak.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    if schedule == "cosine":
        height = (1.0 + math.cos(math.pi * progress)) / 2.0
    elif schedule == "linear":
        height = 1.0 - progress
    else:
        return peak
    return peak * (final_fraction + (1.0 - final_fraction) * height)
