"""No stage begins, or goes on, with a forward that is not the model's own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dovetail.engine import parity
from dovetail.errors import ParityError
from dovetail.model.attention import ATTENTION_NAME, PackedLayout, packed_attention
from dovetail.rlhf import api
from dovetail.rlhf.api import PPOTrainer
from dovetail.stages import pipeline
from tests.rlhf.tiny import PROMPTS, tiny_engine
from tests.stages.runs import tiny_run
from tests.stages.test_bad_input import SCORED, contents


def attend_to_the_wrong_values(monkeypatch: pytest.MonkeyPatch, *, where: Callable[[Any], bool]) -> None:
    """Our registered attention mixes up the values of the calls whose layout is `where`; the probe lets it pass."""
    monkeypatch.setattr("dovetail.model.load.probe", lambda _: None)
    monkeypatch.setattr("dovetail.engine.probe.is_probed", lambda _: True)
    monkeypatch.setattr("dovetail.rlhf.build.is_probed", lambda _: True)
    monkeypatch.setattr("dovetail.engine.probe._fault", lambda *_: None)

    def attention(module: Any, query: Any, key: Any, value: torch.Tensor, mask: Any, **kwargs: Any) -> Any:
        value = value.roll(1, dims=2) if where(kwargs["layout"]) else value
        return packed_attention(module, query, key, value, mask, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, ATTENTION_NAME, attention)


def generates(layout: Any) -> bool:
    return not isinstance(layout, PackedLayout)


def trains(layout: Any) -> bool:
    return isinstance(layout, PackedLayout)


def test_ppo_says_what_it_compared_before_its_first_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline.run(tiny_run(tmp_path, stages=("ppo",), ppo=SCORED))
    printed = "".join(capsys.readouterr())
    assert printed.count("parity: 48 tokens of 3 answers") == 1
    assert printed.index("parity: ") < printed.index("stage 3: PPO: 3 steps")


def test_ppo_refuses_generation_that_is_not_the_models_own_and_a_resumed_run_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_run(tmp_path, stages=("ppo",), ppo={**SCORED, "max_steps": 4})
    with monkeypatch.context() as patch:
        patch.setattr("dovetail.stages.ppo.Guard.check", stop_after(2))
        with pytest.raises(Stopped):
            pipeline.run(config)
    before = contents(tmp_path / "run")
    assert any("checkpoints/step-00000001" in name for name in before)
    with monkeypatch.context() as patch:
        attend_to_the_wrong_values(patch, where=generates)
        with pytest.raises(ParityError, match=r"LlamaForCausalLM: generation .*first layer that differs is"):
            pipeline.run(config)
    assert contents(tmp_path / "run") == before
    pipeline.run(config)
    assert (tmp_path / "run/ppo/done").exists()


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_every_stage_refuses_a_training_forward_that_is_not_the_models_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    attend_to_the_wrong_values(monkeypatch, where=trains)
    with pytest.raises(ParityError, match=r"the training forward and the plain forward .* disagree"):
        pipeline.run(tiny_run(tmp_path, stages=(stage,), ppo=SCORED))
    assert not list((tmp_path / "run").rglob("*.safetensors"))


def test_a_trainer_of_ones_own_is_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[list[int]]] = []

    def check(engine: Any, prompts: Any, **kwargs: Any) -> Any:
        seen.append(prompts)
        return parity.check_parity(engine, prompts, **kwargs)

    monkeypatch.setattr(api, "check_parity", check)
    trainer = PPOTrainer(tiny_engine())
    for _ in range(2):
        trainer.train_rlhf(trainer.generate_experience(PROMPTS))
    chat = trainer.engine.roles.chat
    assert seen == [[chat.prompt_ids([{"role": "user", "content": text}]) for text in PROMPTS[:3]]]


class Stopped(Exception):
    """By the test."""


def stop_after(step_to_stop: int) -> Callable[..., None]:
    def stop(guard: Any, row: Any, *, step: int) -> None:
        if step == step_to_stop:
            raise Stopped

    return stop
