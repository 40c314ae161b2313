"""A run that is killed and started again ends exactly where an undisturbed one does."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dovetail.stages import pipeline
from tests.stages.runs import tiny_run

ROOT = Path(__file__).parents[2]
STAGES = ("sft", "reward", "ppo")
PLACES = [(stage, what) for stage in STAGES for what in ("step", "checkpoint", "model")]
MODELS = ("sft/model", "reward/model", "ppo/model", "ppo/model_ema", "ppo/best")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """(a run that nothing disturbed, one killed at nine places and then finished)."""
    folder = tmp_path_factory.mktemp("resume")
    config = tiny_run(folder)
    killed = config.model_copy(update={"output_dir": str(folder / "killed")})
    (folder / "config.json").write_text(killed.model_dump_json())
    (folder / "places.json").write_text(json.dumps(PLACES))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the killed processes: sums in another order round otherwise
    try:
        command = [sys.executable, "-m", "tests.stages.killed", "config.json", "places.json"]
        subprocess.run(
            [*command[:3], *(str(folder / name) for name in command[3:])],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            check=True,
            timeout=300,
        )
        pipeline.run(config)
        pipeline.run(killed)
        yield Path(config.output_dir), Path(killed.output_dir)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("model", MODELS)
def test_a_run_killed_at_nine_places_ends_with_the_same_bytes(runs: tuple[Path, Path], model: str) -> None:
    undisturbed, killed = ((run / model / "model.safetensors").read_bytes() for run in runs)
    assert killed == undisturbed


def test_a_killed_run_reports_every_step_once_and_with_the_same_numbers(runs: tuple[Path, Path]) -> None:
    undisturbed, killed = (metrics_of(run) for run in runs)
    assert killed == undisturbed
    assert [step for step, row in killed if "sft/loss" in row] == [1, 2, 3]


def test_a_killed_run_keeps_every_sample_answer_once(runs: tuple[Path, Path]) -> None:
    undisturbed, killed = ((run / "ppo" / "samples.jsonl").read_text() for run in runs)
    assert killed == undisturbed


def test_a_killed_run_comes_to_the_same_results(runs: tuple[Path, Path]) -> None:
    undisturbed, killed = (json.loads((run / "summary.json").read_text()) for run in runs)
    assert {stage: killed[stage] for stage in STAGES} == {stage: undisturbed[stage] for stage in STAGES}


def test_nothing_half_written_is_left_behind(runs: tuple[Path, Path]) -> None:
    names = [sorted(str(p.relative_to(run)) for p in run.rglob("*") if p.name != ".lock") for run in runs]
    assert names[0] == names[1]


def test_finished_stages_are_skipped(runs: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_run(runs[0].parent)
    for name in STAGES:
        monkeypatch.setattr(getattr(pipeline, name), "run", fail)
    before = contents(runs[0])
    pipeline.run(config)
    assert contents(runs[0]) == before


def fail(*_: Any) -> None:
    raise AssertionError("a finished stage ran again")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def metrics_of(run: Path) -> list[tuple[int, dict[str, float]]]:
    """All rows but their times."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], {k: v for k, v in row.items() if "/" in k and "seconds" not in k}) for row in rows]
