"""Two processes come to what one comes to with methods that have no critic: metrics and weights."""

from pathlib import Path
from typing import Any

import pytest

from dovetail.stages import pipeline
from tests.parallel.group import run_all
from tests.parallel.test_training import at_stage, expect_same_numbers, metrics_of
from tests.stages.test_algorithms import refilling_run, run_of
from tests.stages.test_dpo import run_of as dpo_run

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "zero-0": ("gspo", {}),
    "zero-3": ("grpo", {}),
    "zero-1": (
        "grpo", {"batch_size": 6, "minibatches": 2, "ppo_epochs": 3, "approx_kl_stop": 1e-3, "kl_coefficient": 0.5}
    ),
    "zero-3-pairs": ("online_dpo", {"batch_size": 12, "minibatches": 3}),
    "zero-2-best": ("best_of_n", {"lora": True}),
}  # fmt: skip
"""Case -> the method, and settings of `ppo`. Three answers of a minibatch are shared by two processes."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Case -> (the run of two processes, that of one)."""
    folder = tmp_path_factory.mktemp("algorithms")
    pipeline.run(refilling_run(folder, name="zero-2-alone"))
    together = [at_stage(refilling_run(folder, name="zero-2", micro_batch_tokens=100), 2)]
    for name, (algorithm, ppo) in CASES.items():
        pipeline.run(run_of(folder, algorithm, name=f"{name}-alone", **ppo))
        config = run_of(folder, algorithm, name=name, micro_batch_tokens=100, **ppo)
        together.append(at_stage(config, int(name[5])))
    run_all([(config, None) for config in together], size=2)
    return {name: (folder / name, folder / f"{name}-alone") for name in (*CASES, "zero-2")}


@pytest.mark.parametrize("case", [*CASES, "zero-2"])
def test_two_processes_equal_one(runs: dict[str, tuple[Path, Path]], case: str) -> None:
    expect_same_numbers(*runs[case], ["ppo/model"])


@pytest.mark.slow
def test_four_processes_equal_one(tmp_path: Path) -> None:
    """Of prompts, pairs and micro-batches some processes have more than others, and some have none."""
    cases = {"zero-3-grpo": "grpo", "zero-2-online": "online_dpo", "zero-0-picked": "best_of_n"}
    together = [at_stage(dpo_run(tmp_path, name="zero-1-dpo", micro_batch_tokens=100), 1)]
    pipeline.run(dpo_run(tmp_path, name="zero-1-dpo-alone"))
    for name, algorithm in cases.items():
        pipeline.run(run_of(tmp_path, algorithm, name=f"{name}-alone", batch_size=6))
        config = run_of(tmp_path, algorithm, name=name, batch_size=6, micro_batch_tokens=100)
        together.append(at_stage(config, int(name[5])))
    run_all([(config, None) for config in together], size=4)
    expect_same_numbers(tmp_path / "zero-1-dpo", tmp_path / "zero-1-dpo-alone", ["dpo/model"])
    for name in cases:
        expect_same_numbers(tmp_path / name, tmp_path / f"{name}-alone", ["ppo/model"])


def test_all_processes_stop_together_when_the_actor_has_gone_far(runs: dict[str, tuple[Path, Path]]) -> None:
    rows = [row for _, row in metrics_of(runs["zero-1"][0]) if "ppo/stopped_by_kl" in row]
    steps = [row["ppo/actor_steps"] for row in rows]
    assert len(steps) == 3
    assert [row["ppo/stopped_by_kl"] for row in rows] == [float(taken < 6) for taken in steps]
    assert min(steps) < 6
