"""The model of step time meets what one GPU was measured to do, and its document shows what it says."""

from typing import Any

import pytest

from tests.benchmarks.test_benchmarks import FOLDER, load

model: Any = load("scaling_model")
MEASURED = {64: (1.14, 0.27, 0.71), 256: (3.08, 1.23, 2.74), 1024: (10.94, 4.54, 11.02)}
"""Answers -> seconds of generating, scoring and training on one H100, from docs/performance.md."""


@pytest.mark.parametrize("answers", MEASURED)
def test_one_gpu_takes_what_it_was_measured_to_take(answers: int) -> None:
    found = model.step_of(model.ACTORS[0], 1, answers)
    measured = MEASURED[answers]
    assert (found.generate, found.score, found.train) == pytest.approx(measured, rel=0.14)
    assert found.seconds == pytest.approx(sum(measured), rel=0.08)
    assert found.gather == 0


def test_the_larger_model_generates_as_fast_as_measured() -> None:
    assert model._generate(model.ACTORS[1], 64, 1, 1e12) == pytest.approx(6.5, rel=0.03)


def test_a_ring_brings_what_is_missing_over_the_slower_link() -> None:
    hops = 7 * model.HOP_IN_NODE
    assert model._ring(8e9, 8, 1) == pytest.approx(7e9 / 360e9 + hops)
    assert model._ring(16e9, 16, 1) == pytest.approx(15e9 / 320e9 + 2 * hops + 2 * model.HOP_BETWEEN_NODES)
    assert model._ring(8e9, 1, 1) == 0


def test_the_document_shows_the_table() -> None:
    document = (FOLDER.parent / "docs/scaling.md").read_text()
    assert "\n".join(model.table()) in document
