"""The disk fills up while a stage writes its final model: nothing that was there is harmed, and the run can go on."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from dovetail.errors import CheckpointError
from dovetail.stages import pipeline
from tests.stages.runs import tiny_run
from tests.stages.test_bad_input import contents

MODELS = ["sft/model", "reward/model", "ppo/model", "ppo/model_ema"]


@pytest.mark.parametrize("model", MODELS)
def test_a_full_disk_at_the_final_model_harms_nothing_and_the_same_command_finishes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    whole, broken = (tiny_run(tmp_path, output_dir=str(tmp_path / name)) for name in ("whole", "broken"))
    pipeline.run(whole)
    run = tmp_path / "broken"
    before: dict[str, bytes] = {}
    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedModel, "save_pretrained", disk_full_at(run / model, before))
        with pytest.raises(
            CheckpointError, match=rf"could not be written to {run / model}: the disk is full"
        ):
            pipeline.run(broken)
    assert f"{model.partition('/')[0]}/checkpoints/step-00000003/tensors.safetensors" in before
    assert contents(run) == before
    pipeline.run(broken)
    finished = contents(run)
    for name, expected in contents(tmp_path / "whole").items():
        if name.endswith("model.safetensors"):
            assert finished[name] == expected, name


def disk_full_at(folder: Path, before: dict[str, bytes]) -> Any:
    """`save_pretrained` on a disk that has room for half of the model in `folder`; `before` is what lay there then."""
    save = PreTrainedModel.save_pretrained

    def save_pretrained(model: PreTrainedModel, place: str | Path, **options: Any) -> None:
        is_trial = not options["state_dict"]  # before the first step everything but the weights is written
        is_other = Path(place).name != f".{folder.name}.unfinished" or Path(place).parent != folder.parent
        if is_trial or is_other:
            save(model, place, **options)
            return
        before.update(contents(Path(folder).parents[1]))
        (Path(place) / "model.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return save_pretrained
