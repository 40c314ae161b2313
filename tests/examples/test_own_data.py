"""The rows and settings of docs/first-run.md train through all stages."""

from pathlib import Path

import yaml

from dovetail.config.run import RunConfig
from dovetail.stages import pipeline
from examples.own_data import rows
from tests.stages.runs import save_tiny_model, write_rows

ROOT = Path(__file__).parents[2]


def test_the_rows_train_a_model_with_the_settings_beside_them(tmp_path: Path) -> None:
    made = rows()
    assert len(made) == len({row["prompt"] for row in made}) == 240
    settings = yaml.safe_load((ROOT / "examples/own_data.yaml").read_text(encoding="utf-8"))
    settings["actor"]["path"] = str(save_tiny_model(tmp_path / "model"))
    settings["data"]["blend"] = [str(write_rows(tmp_path / "my_pairs.jsonl", made))]
    settings |= {"output_dir": str(tmp_path / "run"), "device": "cpu", "tracking": {"tensorboard": False}}
    for stage in ("sft", "reward", "ppo"):
        settings[stage]["max_steps"] = 2
    settings["ppo"] |= {"batch_size": 4, "sampling": {"max_new_tokens": 4}}
    pipeline.run(RunConfig.model_validate(settings))
    assert (tmp_path / "run/ppo/model/config.json").exists()
