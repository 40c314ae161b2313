"""What a gradient step moves between processes is what docs/scaling.md says."""

import json

import pytest

from tests.fakes import tiny_model
from tests.parallel.group import run_group


@pytest.mark.slow
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_a_step_receives_what_the_formula_says(micro_batches: int) -> None:
    codes, said = run_group(["tests.parallel.counting", str(micro_batches)], size=2)
    assert codes == [0, 0], said
    weights = sum(parameter.numel() * 4 for parameter in tiny_model().parameters())
    half, gradients, m = (
        1 / 2,
        weights,
        micro_batches,
    )  # (N - 1) / N for two processes; float32 weights, all trained
    assert {int(stage): received for stage, received in json.loads(said[0]).items()} == {
        0: 2 * half * gradients,
        1: half * (weights + gradients),
        2: m * half * (weights + gradients),
        3: m * half * (2 * weights + gradients),
    }
