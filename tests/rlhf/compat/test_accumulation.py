"""Losses of several calls make one optimiser step, and the schedule counts steps."""

import math
from typing import Any

import pytest
import torch

from dovetail.rlhf.compat import accumulation
from dovetail.rlhf.compat.deepspeed_chat import (
    DeepSpeedPPOTrainer,
    DeepSpeedPPOTrainerUnsupervised,
)
from dovetail.training.step import StepReport, gradient_step
from tests.fakes import tiny_model
from tests.rlhf.compat.tiny import arguments, prompt_batch, same, tiny, trainer_of, weights
from tests.tolerance import assert_near


def reports_of(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, StepReport]]:
    """The models that take steps from now on, with what is reported of each step."""
    reports: list[tuple[Any, StepReport]] = []

    def recorded(model: Any, *given: Any, **named: Any) -> StepReport:
        report = gradient_step(model, *given, **named)
        reports.append((model, report))
        return report

    monkeypatch.setattr(accumulation, "gradient_step", recorded)
    return reports


@pytest.mark.parametrize("with_text", [False, True])
def test_the_schedule_ends_with_the_run_under_accumulation(
    monkeypatch: pytest.MonkeyPatch, with_text: bool
) -> None:
    args = arguments(gradient_accumulation_steps=2, actor_learning_rate=1e-4, critic_learning_rate=2e-4)
    kind = DeepSpeedPPOTrainerUnsupervised if with_text else DeepSpeedPPOTrainer
    trainer = kind(tiny(args, steps=4), args)
    out = trainer.generate_experience(prompt_batch(trainer.rlhf_engine))
    reports = reports_of(monkeypatch)
    text = {"input_ids": torch.randint(0, 250, (2, 9)), "attention_mask": torch.ones(2, 9)}
    for _ in range(8):
        trainer.train_rlhf(out)
        if isinstance(trainer, DeepSpeedPPOTrainerUnsupervised):
            trainer.train_unsupervised(text, 0.5)
    cosine = [0.5 * (1 + math.cos(math.pi * step / 4)) for step in range(4)]
    for model, peak in ((trainer.engine.roles.actor, 1e-4), (trainer.engine.roles.critic, 2e-4)):
        rates = [report.learning_rate for of, report in reports if of is model]
        assert rates == pytest.approx([peak * height for height in cosine])


def test_accumulated_losses_are_averaged_into_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    alone, twice = trainer_of(), trainer_of(gradient_accumulation_steps=2)
    out = alone.generate_experience(prompt_batch(alone.rlhf_engine))
    twice.generate_experience(prompt_batch(twice.rlhf_engine))
    before = weights(twice.engine.roles.actor), weights(twice.engine.roles.critic)
    first = twice.train_rlhf(out)
    assert same(before[0], weights(twice.engine.roles.actor))
    assert same(before[1], weights(twice.engine.roles.critic))
    reports = reports_of(monkeypatch)
    losses = alone.train_rlhf(out)
    second = twice.train_rlhf(out)
    for (_, one), (_, other) in zip(reports[:2], reports[2:], strict=True):
        assert_near(torch.tensor(other.loss), one.loss, dtype=torch.float32)
        assert_near(torch.tensor(other.grad_norm), one.grad_norm, dtype=torch.float32)
    for one, other, found in zip(first, second, losses, strict=True):
        assert_near(one, found.item(), dtype=torch.float32)
        assert_near(other, found.item(), dtype=torch.float32)
    for role in ("actor", "critic"):
        moved_by = getattr(alone.engine.roles, role), getattr(twice.engine.roles, role)
        for one, other in zip(*map(weights, moved_by), strict=True):
            assert_near(one, other, dtype=torch.float32)


def test_a_step_without_a_finite_gradient_is_an_overflow(capsys: pytest.CaptureFixture[str]) -> None:
    trainer = trainer_of()
    out = trainer.generate_experience(prompt_batch(trainer.rlhf_engine))
    plain, trainer.actor_loss_fn = trainer.actor_loss_fn, lambda *given: math.nan * given[0].sum()  # type: ignore[method-assign]
    trainer.train_rlhf(out)
    assert trainer.get_overflow() == (True, False)
    trainer.actor_loss_fn = plain  # type: ignore[method-assign]
    trainer.train_rlhf(out)
    assert trainer.get_overflow() == (False, False)
    assert "not finite" in capsys.readouterr().err


def test_text_joins_the_step_of_the_actor() -> None:
    args = arguments()
    trainer = DeepSpeedPPOTrainerUnsupervised(tiny(args), args)
    actor, critic = trainer.engine.roles.actor, trainer.engine.roles.critic
    out = trainer.generate_experience(prompt_batch(trainer.rlhf_engine))
    before = weights(actor), weights(critic)
    trainer.train_rlhf(out)
    assert same(before[0], weights(actor))
    assert not same(before[1], weights(critic))
    ids = torch.randint(0, 250, (2, 9), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, 6:] = -100
    with torch.no_grad():
        expected = tiny_model()(input_ids=ids, labels=labels).loss.item()
    loss = trainer.train_unsupervised(
        {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}, 0.5
    )
    assert_near(loss, expected, dtype=torch.float32)
    assert not same(before[0], weights(actor))


def test_text_weighs_what_the_loop_says() -> None:
    args = arguments()
    for coefficient, moves in ((0.0, False), (0.5, True)):
        trainer = DeepSpeedPPOTrainerUnsupervised(tiny(args), args)
        trainer.actor_loss_fn = lambda logprobs, *_: 0.0 * logprobs.sum()  # type: ignore[method-assign]
        before = weights(trainer.engine.roles.actor)
        trainer.train_rlhf(trainer.generate_experience(prompt_batch(trainer.rlhf_engine)))
        text = {"input_ids": torch.tensor([[1, 2, 3, 4]]), "attention_mask": torch.ones(1, 4)}
        trainer.train_unsupervised(text, coefficient)
        assert same(before, weights(trainer.engine.roles.actor)) != moves
