"""The small parts that a script imports."""

import torch

from dovetail.rlhf.compat.deepspeed_chat import (
    MiniDataset,
)


def test_without_text_as_many_small_batches_come_as_with_it() -> None:
    nothing = MiniDataset(max_size=2, small_batch_size=3)
    assert nothing.add([[None] * 6]) is None
    assert nothing.add([[None] * 6]) == [[[None] * 3]] * 4
    columns = MiniDataset(max_size=1, small_batch_size=2).add(([1, 2, 3], [4, 5, 6]))
    assert columns == [[[1, 2], [4, 5]], [[3], [6]]]
    whole = MiniDataset(max_size=1, small_batch_size=2).add(torch.tensor([1, 2, 3]))
    assert whole is not None
    assert [part.tolist() for part in whole] == [[1, 2], [3]]
