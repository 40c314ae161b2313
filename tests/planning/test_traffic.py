"""The seconds of rings, worked by hand; the bytes are counted in tests/parallel/test_communication.py."""

import pytest

from dovetail.planning.hardware import gpu_named
from dovetail.planning.traffic import HOP_BETWEEN_NODES, HOP_IN_NODE, ring_seconds, sum_seconds

H100 = gpu_named("h100")


def test_a_ring_brings_what_is_missing_over_the_slower_link() -> None:
    hops = 7 * HOP_IN_NODE
    assert ring_seconds(8e9, H100, gpus=8, per_node=8, collectives=1) == pytest.approx(7e9 / 360e9 + hops)
    two_nodes = 15e9 / 320e9 + 2 * hops + 2 * HOP_BETWEEN_NODES
    assert ring_seconds(16e9, H100, gpus=16, per_node=8, collectives=1) == pytest.approx(two_nodes)
    assert ring_seconds(8e9, H100, gpus=1, per_node=1, collectives=1) == 0


def test_sums_of_a_divided_layer_go_twice_round() -> None:
    assert sum_seconds(H100, num_bytes=1e6, processes=1, layers=3) == 0
    each = 2 * (3 / 4) * 1e6 / 360e9 + 2 * 3 * HOP_IN_NODE
    assert sum_seconds(H100, num_bytes=1e6, processes=4, layers=3) == pytest.approx(2 * 3 * each)
