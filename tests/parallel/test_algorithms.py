"""Two processes come to what one comes to with methods that have no critic: metrics and weights."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dovetail.config.run import RunConfig
from dovetail.stages import pipeline
from tests.parallel.group import run_all
from tests.parallel.test_training import metrics_of, zero
from tests.stages.test_algorithms import run_of
from tests.tolerance import assert_near

CASES = {"zero-0": "gspo", "zero-3": "grpo"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Case -> (the run of two processes, that of one)."""
    folder = tmp_path_factory.mktemp("algorithms")
    together: list[RunConfig] = []
    for name, algorithm in CASES.items():
        pipeline.run(run_of(folder, algorithm, name=f"{name}-alone"))
        config = run_of(folder, algorithm, name=name, micro_batch_tokens=100)
        zero_stage = type(config.zero_stage).model_validate(zero(int(name[5]))["zero_stage"])
        together.append(config.model_copy(update={"zero_stage": zero_stage}))
    run_all([(config, None) for config in together], size=2)
    return {name: (folder / name, folder / f"{name}-alone") for name in CASES}


@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(runs: dict[str, tuple[Path, Path]], case: str) -> None:
    together, alone = runs[case]
    for (step, row), (expected_step, expected) in zip(metrics_of(together), metrics_of(alone), strict=True):
        assert step == expected_step
        assert row.keys() == expected.keys()
        for name, value in row.items():
            assert_near(torch.tensor(value), expected[name])
    weights, same = (load_file(run / "ppo/model/model.safetensors") for run in (together, alone))
    assert weights.keys() == same.keys()
    for name, weight in weights.items():
        assert_near(weight, same[name])
