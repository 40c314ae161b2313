"""Every stage rehearses before its loop where the device has memory of its own, and its result stays the same."""

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from dovetail.config.load import check, load
from dovetail.parallel.world import World
from dovetail.planning.hardware import gpu_like
from dovetail.stages import pipeline
from tests.stages.runs import tiny_run


class Roomy:
    """A device with more memory than is ever held."""

    def begin(self) -> None: ...

    def peak(self) -> int:
        return 1

    def limit(self) -> int:
        return 2**40


def weights_of(folder: str) -> dict[str, Any]:
    return load_file(Path(folder) / "model.safetensors")


@pytest.mark.parametrize("stages", [["sft", "reward", "ppo"], ["sft", "dpo"]])
def test_results_are_the_same_to_the_bit(
    stages: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    algorithm = "dpo" if "dpo" in stages else "ppo"
    plain = tiny_run(tmp_path, algorithm=algorithm, stages=stages)
    pipeline.run(plain)
    assert "rehearsal" not in capsys.readouterr().err
    for module in ("supervised", "ppo"):
        monkeypatch.setattr(f"dovetail.stages.{module}.probe_of", lambda device: Roomy())
    rehearsed = check({**plain.model_dump(mode="json"), "output_dir": str(tmp_path / "rehearsed")})
    pipeline.run(rehearsed)
    said = capsys.readouterr().err
    for stage in stages:
        assert f"rehearsal: {stage}: " in said
        one, other = (weights_of(f"{run.output_dir}/{stage}/model") for run in (plain, rehearsed))
        assert all((one[name] == other[name]).all() for name in one)


def test_the_plan_is_said_before_the_first_stage(capsys: pytest.CaptureFixture[str]) -> None:
    config = load("opt-1.3b")
    pipeline.say_plan(config, World(size=8), name="NVIDIA A100-SXM4-80GB", memory=80 * 2**30)
    said = capsys.readouterr().err
    assert "GiB (A100 80GB); a step, at full length: SFT " in said
    pipeline.say_plan(load("opt-66b"), World(), name="NVIDIA L4", memory=22 * 2**30)
    assert "which is too much: `dovetail plan` says what fits" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "overrides"), [("Unknown", ()), ("NVIDIA H200", ("actor.path=own/model",))])
def test_what_is_not_known_is_not_planned(
    name: str, overrides: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline.say_plan(load("opt-1.3b", overrides), World(), name=name, memory=2**37)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("name", "gib", "meant"), [
    ("NVIDIA A100-SXM4-40GB", 39.4, "a100-40g"), ("NVIDIA H100 80GB HBM3", 79.2, "h100-80g"),
    ("NVIDIA GeForce RTX 4090", 23.5, "rtx-4090"), ("NVIDIA RTX A6000", 47.4, "a6000-48g"),
    ("Tesla V100-SXM2-32GB", 31.7, "v100-32g"), ("NVIDIA L40S", 44.4, "l40s"), ("NVIDIA L4", 22.0, "l4"),
])  # fmt: skip
def test_gpus_are_known_by_their_drivers_names(name: str, gib: float, meant: str) -> None:
    gpu = gpu_like(name, gib)
    assert gpu is not None
    assert gpu.key == meant
