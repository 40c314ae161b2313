"""The rows of each batch, as a pure function of the step.

Responsible for: the order of rows. A run that resumes at step n sees the rows that it would have seen; nothing
about the order needs saving.
Not responsible for: the rows themselves (tokenize.py), weights of sources (blend.py).
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray


class BatchOrder:
    """Rows 0 to num_rows - 1 in batches: epoch after epoch, each in an order of its own, no row left over.

    A batch may reach from one epoch into the next; one larger than the data holds rows of several epochs.
    """

    def __init__(self, num_rows: int, batch_size: int, seed: int) -> None:
        if num_rows < 1 or batch_size < 1:
            raise ValueError(f"cannot make batches of {batch_size} from {num_rows} rows")
        self.num_rows = num_rows
        self.batch_size = batch_size
        self.seed = seed
        self._permutation = lru_cache(maxsize=2)(self._permutation_of)

    def batch(self, step: int) -> list[int]:
        """Return the rows of batch number `step`, counted from 0."""
        first = step * self.batch_size
        rows: list[int] = []
        while len(rows) < self.batch_size:
            epoch, place = divmod(first + len(rows), self.num_rows)
            wanted = self.batch_size - len(rows)
            rows += self._permutation(epoch)[place : place + wanted].tolist()
        return rows

    def _permutation_of(self, epoch: int) -> NDArray[np.int64]:
        return np.random.default_rng([self.seed, epoch]).permutation(self.num_rows)
