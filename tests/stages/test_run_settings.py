"""When a run measures, saves and shows, and how much it holds: each setting acts in the stage that it is given for."""

import json
from pathlib import Path
from typing import Any

import pytest

from dovetail.rlhf import build
from dovetail.rlhf.api import PPOTrainer
from dovetail.stages import context, pipeline, ppo, supervised
from tests.stages.runs import tiny_run

STAGES: dict[str, dict[str, Any]] = {
    "sft": {
        "max_steps": 5,
        "eval_every": 2,
        "save_every": 2,
        "keep_checkpoints": 3,
        "micro_batch_tokens": 71,
    },
    "reward": {
        "max_steps": 7,
        "eval_every": 3,
        "save_every": 1,
        "keep_checkpoints": 4,
        "micro_batch_tokens": 72,
    },
    "ppo": {
        "max_steps": 6,
        "eval_every": 4,
        "save_every": 3,
        "keep_checkpoints": 1,
        "micro_batch_tokens": 73,
    },
}
MEASURED = {"sft": "sft/held_out_loss", "reward": "reward/accuracy", "ppo": "ppo/held_out_objective"}
KL_LIMIT, KL_STOP, SHOWN_EVERY = 17.0, 90.0, 2


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[Any]]]:
    """A run in which the stages differ in everything, and what they made on the way."""
    seen: dict[str, list[Any]] = {"budget": [], "kept": [], "recomputes": [], "kl_limit": [], "kl_stop": []}
    with pytest.MonkeyPatch.context() as patch:
        note(patch, supervised, "TokenBudget", lambda tokens, **_: seen["budget"].append(tokens))
        note(patch, build, "TokenBudget", lambda tokens, **_: seen["budget"].append(tokens))
        note(patch, context, "Checkpoints", lambda folder, *, keep, world: seen["kept"].append(keep))
        note(patch, ppo, "Best", lambda folder, *, kl_limit: seen["kl_limit"].append(kl_limit))
        note(patch, ppo, "Guard", lambda config: seen["kl_stop"].append(config.kl_stop))
        note(
            patch, supervised, "optimizer_for", lambda model, _: seen["recomputes"].append(recomputes(model))
        )
        note(
            patch,
            PPOTrainer,
            "update",
            lambda trainer, *_, **__: seen["recomputes"].extend(
                recomputes(model) for model in (trainer.engine.roles.actor, trainer.engine.roles.critic)
            ),
        )
        stages = {name: {"epochs": 9.0, **own} if name != "ppo" else own for name, own in STAGES.items()}
        for own in stages.values():
            own["activation_checkpointing"] = True
        stages["ppo"] |= {"kl_limit": KL_LIMIT, "kl_stop": KL_STOP, "print_samples_every": SHOWN_EVERY}
        config = tiny_run(tmp_path_factory.mktemp("settings"), **stages)
        pipeline.run(config)
    return Path(config.output_dir), seen


def note(patch: pytest.MonkeyPatch, owner: Any, name: str, look: Any) -> None:
    """Let `look` see the arguments of each call."""
    honest = getattr(owner, name)

    def noted(*arguments: Any, **options: Any) -> Any:
        look(*arguments, **options)
        return honest(*arguments, **options)

    patch.setattr(owner, name, noted)


def recomputes(model: Any) -> bool:
    return bool(model.is_gradient_checkpointing)


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_measures_as_often_as_it_is_told_and_at_its_end(
    run: tuple[Path, dict[str, list[Any]]], stage: str
) -> None:
    rows = [json.loads(line) for line in (run[0] / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows if MEASURED[stage] in row]
    settings = STAGES[stage]
    last, every = settings["max_steps"], settings["eval_every"]
    expected = [step for step in range(1, last + 1) if step % every == 0 or step == last]
    assert steps == ([0, *expected] if stage == "ppo" else expected)


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_saves_as_often_as_it_is_told_and_keeps_the_newest(
    run: tuple[Path, dict[str, list[Any]]], stage: str
) -> None:
    settings = STAGES[stage]
    last, every, keep = settings["max_steps"], settings["save_every"], settings["keep_checkpoints"]
    saved = [step for step in range(1, last + 1) if step % every == 0 or step == last]
    found = {int(folder.name.removeprefix("step-")) for folder in (run[0] / stage / "checkpoints").iterdir()}
    assert set(saved[-keep:]) <= found <= set(saved)
    assert len(found) <= keep + 1  # the best one beside them


def test_answers_are_shown_as_often_as_is_asked_for(run: tuple[Path, dict[str, list[Any]]]) -> None:
    rows = [json.loads(line) for line in (run[0] / "ppo/samples.jsonl").read_text().splitlines()]
    assert {row["step"] for row in rows} == {2, 4, 6}


def test_limits_and_what_saves_memory_reach_the_stage_that_they_are_given_for(
    run: tuple[Path, dict[str, list[Any]]],
) -> None:
    seen = run[1]
    assert seen["budget"] == [71, 72, 73]
    assert seen["kept"] == [3, 4, 1]
    assert seen["kl_limit"] == [KL_LIMIT]
    assert seen["kl_stop"] == [KL_STOP]
    assert seen["recomputes"] == [True] * (2 + 2 * 6)
