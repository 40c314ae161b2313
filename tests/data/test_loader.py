from __future__ import annotations

from collections import Counter

import pytest

from dovetail.data.loader import BatchOrder


@pytest.mark.parametrize(("num_rows", "batch_size"), [(10, 3), (12, 4), (3, 8), (1, 1), (7, 7)])
def test_every_epoch_holds_every_row_once(num_rows: int, batch_size: int) -> None:
    order = BatchOrder(num_rows, batch_size, seed=0)
    stream = [row for step in range(5 * num_rows) for row in order.batch(step)]
    for epoch in range(5):
        assert sorted(stream[epoch * num_rows : (epoch + 1) * num_rows]) == list(range(num_rows))


def test_a_batch_depends_on_nothing_but_its_step() -> None:
    order = BatchOrder(100, 7, seed=3)
    assert [order.batch(step) for step in (40, 2, 40, 17)] == [
        BatchOrder(100, 7, seed=3).batch(step) for step in (40, 2, 40, 17)
    ]


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    order = BatchOrder(50, 50, seed=0)
    assert order.batch(0) != order.batch(1)
    assert order.batch(0) != BatchOrder(50, 50, seed=1).batch(0)


def test_an_order_is_evenly_shuffled() -> None:
    first = Counter(BatchOrder(5, 1, seed).batch(0)[0] for seed in range(2_000))
    assert all(abs(count - 400) < 4 * (2_000 * 0.2 * 0.8) ** 0.5 for count in first.values())


def test_no_rows_make_no_batches() -> None:
    with pytest.raises(ValueError, match="cannot make batches of 4 from 0 rows"):
        BatchOrder(0, 4, seed=0)
