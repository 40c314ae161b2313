"""The plan meets what was measured, and its page shows what it says."""

import re
from pathlib import Path

import pytest

from dovetail.planning.measured import Measured, measured
from dovetail.planning.page import page
from dovetail.planning.sweep import fastest, rate_of, tables

ROOT = Path(__file__).parents[2]
FITTED_NOTHING = [row for row in measured() if not row.fitted]


def name(row: Measured) -> str:
    return f"{row.gpu} {row.actor} {row.lora} {row.batch} x {row.prompt}+{row.new} by {row.micro}"


@pytest.mark.parametrize("row", measured(), ids=name)
def test_a_step_takes_what_was_measured_to_12_percent(row: Measured) -> None:
    assert row.predicted().step_seconds == pytest.approx(row.step_seconds, rel=0.12)


@pytest.mark.parametrize("row", [row for row in measured() if row.peak], ids=name)
def test_the_peak_is_what_was_measured_to_5_percent(row: Measured) -> None:
    phases = row.predicted().phases
    assert max(phase.peak for phase in phases) / 2**30 == pytest.approx(row.peak, rel=0.05)
    for phase, known in zip(phases, row.gib, strict=False):
        if len(row.gib) == 3:
            assert phase.peak / 2**30 == pytest.approx(known, rel=0.06), phase.name


def test_most_rows_fitted_nothing() -> None:
    assert len(FITTED_NOTHING) >= 8
    assert len(measured()) - len(FITTED_NOTHING) <= 6


def test_the_page_is_what_the_planner_says() -> None:
    """If this fails: `make docs-plan`."""
    assert (ROOT / "docs/plan.md").read_text(encoding="utf-8") == page()


def test_every_cell_of_the_predecessor_s_tables_says_what_it_is() -> None:
    text = "\n".join(tables())
    epochs = [line for line in text.split("###")[1].splitlines() if re.match(r"\| \d+ x ", line)]
    assert len(epochs) == 12
    for line in epochs:
        for cell in line.strip("|").split("|")[1:]:
            assert re.search(r" (p|p h|m|m f)( \[.*\])? $", cell), cell
    for title in ("Table 3", "Tables 4 to 6", "Figure 3", "Figure 4", "Figure 6", "Figure 7"):
        assert f"### {title}" in text


def test_more_gpus_are_never_slower_in_the_sweep() -> None:
    rates = [rate_of(fastest("opt-13b", "a100-80g", gpus)) for gpus in (8, 16, 32, 64)]
    known = [rate for rate in rates if rate is not None]
    assert len(known) == 4
    assert known == sorted(known)
