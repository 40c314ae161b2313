"""Two processes come to what one comes to with methods that have no critic: metrics and weights."""

from pathlib import Path

import pytest

from dovetail.config.run import RunConfig
from dovetail.stages import pipeline
from tests.parallel.group import run_all
from tests.parallel.test_training import at_stage, expect_same_numbers
from tests.stages.test_algorithms import run_of

CASES = {"zero-0": "gspo", "zero-3": "grpo"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Case -> (the run of two processes, that of one)."""
    folder = tmp_path_factory.mktemp("algorithms")
    together: list[RunConfig] = []
    for name, algorithm in CASES.items():
        pipeline.run(run_of(folder, algorithm, name=f"{name}-alone"))
        config = run_of(folder, algorithm, name=name, micro_batch_tokens=100)
        together.append(at_stage(config, int(name[5])))
    run_all([(config, None) for config in together], size=2)
    return {name: (folder / name, folder / f"{name}-alone") for name in CASES}


@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(runs: dict[str, tuple[Path, Path]], case: str) -> None:
    expect_same_numbers(*runs[case], ["ppo/model"])
