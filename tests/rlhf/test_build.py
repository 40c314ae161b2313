"""Memory: when activations are computed again, and what waits on the host while answers are drawn."""

import math
from typing import Any

import pytest
import torch

from dovetail.config.stages import OptimizerConfig, SftConfig
from dovetail.parallel.shard import Layout, ShardedModel
from dovetail.rlhf import build, update
from dovetail.rlhf.api import PPOTrainer
from dovetail.rlhf.build import checkpoint_activations, same_tokens
from dovetail.text.chat_format import ChatFormat
from tests.fakes import byte_tokenizer, tiny_model
from tests.rlhf.tiny import PROMPTS, tiny_config, tiny_engine

PLENTY, SCARCE = 2**30, 2**10
"""Bytes free for a step of tiny models."""


@pytest.mark.parametrize(
    ("setting", "device", "free", "is_on"),
    [
        ("auto", "cuda", PLENTY, False),
        ("auto", "cuda", SCARCE, True),
        ("auto", "cpu", SCARCE, False),
        (True, "cpu", PLENTY, True),
        (True, "cuda", PLENTY, True),
        (False, "cuda", SCARCE, False),
    ],
)
def test_activations_are_computed_again_if_asked_for_or_if_a_step_would_not_fit(
    setting: Any, device: str, free: int, is_on: bool, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(build, "free_bytes", lambda device: free)
    models = [tiny_model(), tiny_model("opt")]
    settings = SftConfig(activation_checkpointing=setting, micro_batch_tokens=64)
    checkpoint_activations(models, settings, device=torch.device(device), is_averaged=True)
    assert [model.is_gradient_checkpointing for model in models] == [is_on, is_on]
    assert ("would need about" in "".join(capsys.readouterr())) == (is_on and setting == "auto")


PLAIN = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
TURNS_APART = (
    "{% for m in messages %}{{ '\n' if loop.index > 2 }}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
)
QUIET = "{% for m in messages if m.role != 'system' %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"


@pytest.mark.parametrize(("other", "same"), [(PLAIN, True), (TURNS_APART, False), (QUIET, False)])
def test_formats_are_the_same_only_if_they_are_for_system_messages_and_several_turns(
    other: str, same: bool
) -> None:
    assert same_tokens(ChatFormat(byte_tokenizer(PLAIN)), ChatFormat(byte_tokenizer(other))) == same


def test_the_kl_coefficient_waits_until_the_actor_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(update, "ENOUGH", math.inf)
    config = tiny_config(critic_warmup_rollouts=2, kl_target=6.0)
    trainer = PPOTrainer(tiny_engine("llama", config, total_steps=20))
    seen = []
    for _ in range(3):
        trainer.train_rlhf(trainer.generate_experience(PROMPTS))
        seen.append(trainer.kl_coefficient)
    assert seen == [0.1, 0.1, pytest.approx(0.1 * 0.98)]


def test_processes_that_compute_layers_together_all_compute_them_again_if_one_must(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Neighbours:
        @property
        def everyone(self) -> "Neighbours":
            return self

        def gather(self, mine: bool) -> list[bool]:
            return [mine, True]

    monkeypatch.setattr(build, "free_bytes", lambda device: PLENTY)
    model = tiny_model()
    together: Any = Neighbours()
    monkeypatch.setattr(build, "sharding_of", lambda model: ShardedModel(model, Layout(together)))
    checkpoint_activations([model], SftConfig(), device=torch.device("cuda"), is_averaged=False)
    assert model.is_gradient_checkpointing


def test_parking_changes_no_bit_of_a_run_and_nothing_waits_on_the_device_while_answers_are_drawn() -> None:
    states = []
    for offloads in (False, True):
        trainer = PPOTrainer(tiny_engine("llama", tiny_config()))
        learners = trainer.engine.learners
        learners.offloads = offloads
        seen: list[bool] = []
        honest = trainer.engine.roles.engine.generating

        def generating(learners: Any = learners, seen: Any = seen, honest: Any = honest) -> Any:
            seen += [part._offloaded.is_offloaded for part in (learners.actor, learners.critic, learners.ema)]
            return honest()

        trainer.engine.roles.engine.generating = generating
        for _ in range(2):
            trainer.train_rlhf(trainer.generate_experience(PROMPTS))
        assert seen == [offloads] * 9  # the parity check draws answers, too
        states.append(trainer.state_dict()["engine"])
    plain, offloaded = states
    for part in ("actor", "critic"):
        assert all(torch.equal(plain[part][name], offloaded[part][name]) for name in plain[part])
    averages = [state["ema"]["averages"] for state in states]
    assert all(torch.equal(averages[0][name], averages[1][name]) for name in averages[0])


def test_what_is_parked_comes_back_when_drawing_fails() -> None:
    learners = tiny_engine().learners
    learners.offloads = True
    with pytest.raises(RuntimeError, match="no"), learners.offloaded():
        raise RuntimeError("no")
    assert not any(part._offloaded.is_offloaded for part in (learners.actor, learners.critic, learners.ema))


def test_the_average_of_a_half_precision_actor_is_of_its_full_precision_weights() -> None:
    slow = OptimizerConfig(learning_rate=1e-5, schedule="constant")
    config = tiny_config(actor_optimizer=slow, ema_decay=0.0)
    trainer = PPOTrainer(tiny_engine("llama", config, torch.bfloat16))
    trainer.train_rlhf(trainer.generate_experience(PROMPTS))
    learners, actor = trainer.engine.learners, trainer.engine.roles.actor
    average = learners.ema.averages()
    assert all(torch.equal(average[name], weight) for name, weight in learners.actor.weights().items())
    assert any(not torch.equal(average[name], weight.float()) for name, weight in actor.named_parameters())
