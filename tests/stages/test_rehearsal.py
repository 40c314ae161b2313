"""Every stage rehearses before its loop where the device has memory of its own, and its result stays the same."""

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from dovetail.config.load import check
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
