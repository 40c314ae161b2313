import io
from pathlib import Path

import pytest
from rich.console import Console

from dovetail.cli import demo
from dovetail.errors import ModelError

PARTS = {"truth": 0.5, "politeness": 0.75, "brevity": 1.0, "clean": 0.25}
SUMMARY = {
    "gold": {"base": 0.1, "sft": 0.6, "ppo": 0.8, "ema": 0.81},
    "gold_greedy": {"base": 0.2, "sft": 0.7, "ppo": 0.9, "ema": 0.91},
    "parts": dict.fromkeys(("base", "sft", "ppo", "ema"), PARTS),
    "test_prompts": 120,
    "reward": {"accuracy": 0.8125, "steps": 100},
    "seconds": {"sft": 10.4, "reward": 20.6, "ppo": 30.0, "total": 61.2},
}


@pytest.mark.parametrize("name", ["tiny", "smollm2"])
def test_the_demo_s_recipes_load_with_all_places_in_its_own_folder(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "smollm2_weights", lambda: tmp_path / "m.gguf")
    config = demo.plan_of(name, 7, str(tmp_path)).run
    assert config.seed == 7
    assert "$" not in config.model_dump_json()
    assert Path(config.output_dir).is_relative_to(tmp_path)
    sources = [*config.data.blend, *config.data.pretraining]
    assert all(Path(source.path).is_relative_to(tmp_path / "data") for source in sources)


def test_the_demo_starts_from_its_own_base_model_or_from_real_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "smollm2_weights", lambda: tmp_path / "m.gguf")
    plan = demo.plan_of("tiny", 3, str(tmp_path))
    assert plan.base is not None
    assert Path(plan.run.actor.path).is_relative_to(tmp_path)
    real = demo.plan_of("smollm2", 3, str(tmp_path))
    assert real.base is None
    assert real.run.actor.path == str(tmp_path / "m.gguf")


def test_several_processes_divide_the_actor(tmp_path: Path) -> None:
    alone, three = (demo.plan_of("tiny", 0, str(tmp_path), num_gpus=count).run for count in (1, 3))
    assert (three.num_gpus, three.zero_stage.actor) == (3, 3)
    assert three.model_copy(update={"num_gpus": 1, "zero_stage": alone.zero_stage}) == alone


def test_the_table_shows_every_model_part_and_time() -> None:
    text = io.StringIO()
    Console(file=text, width=100).print(demo.table(SUMMARY))
    rows = text.getvalue()
    for shown in (
        "120 held-out prompts",
        "truth",
        "politeness",
        "0.600",
        "0.700",
        "0.800",
        "0.810",
        "0.250",
        "0.812",
    ):
        assert shown in rows
    assert "sft 10 s, reward 21 s, ppo 30 s, total 61 s" in rows


def test_weights_that_are_not_installed_say_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match="not installed") as caught:
        demo.smollm2_weights()
    assert "--no-deps" in str(caught.value.hint)


def test_runs_demo_leads_to_the_newest_demo_and_replaces_nothing_else(tmp_path: Path) -> None:
    link = tmp_path / "demo"
    for seed in (0, 1):
        run = tmp_path / f"demo-tiny-{seed}"
        run.mkdir()
        assert demo.point_at(run, link)
        assert link.resolve() == run
    link.unlink()
    link.mkdir()
    assert not demo.point_at(tmp_path / "demo-tiny-0", link)
    assert not link.is_symlink()
