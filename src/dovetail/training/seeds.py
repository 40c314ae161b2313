"""One seed a step, from one seed a run.

Responsible for: the number that every step's draws (sampling, dropout, order of minibatches) start from.
Not responsible for: drawing.
"""

STRIDE = 1_000_003
"""More than the steps of any run: no two runs share the seed of a step."""


def step_seed(seed: int, step: int) -> int:
    """Return the seed of a step, a function of (seed, step) alone, so that a resumed run draws the same numbers."""
    return seed * STRIDE + step
