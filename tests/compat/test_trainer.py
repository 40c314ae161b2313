"""The objective is the trainer's methods and numbers, as its users override and set them."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from dovetail.compat import accumulation
from dovetail.compat.deepspeed_chat import (
    DeepSpeedPPOTrainer,
    DeepSpeedPPOTrainerUnsupervised,
    MiniDataset,
)
from dovetail.compat.padding import own_part, unpadded
from dovetail.errors import ConfigError
from dovetail.parallel.world import World
from dovetail.training.step import StepReport, gradient_step
from tests.compat.tiny import arguments, prompt_batch, tiny
from tests.fakes import tiny_model
from tests.tolerance import assert_near

NUMBERS = {
    "kl_ctl": 0.7,
    "clip_reward_value": 0.4,
    "cliprange": 0.01,
    "cliprange_value": 0.02,
    "gamma": 0.8,
    "lam": 0.6,
}
"""Each far from what the predecessor sets."""


def trainer_of(**changes: Any) -> DeepSpeedPPOTrainer:
    args = arguments(**changes)
    return DeepSpeedPPOTrainer(tiny(args), args)


def weights(model: Any) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def answer_columns(out: dict[str, Tensor], row: int) -> list[int]:
    """The columns that speak of tokens of the answer."""
    width = out["prompts"].shape[1]
    return [t - 1 for t in range(width, out["input_ids"].shape[1]) if out["attention_mask"][row, t]]


def expected_objective(out: dict[str, Tensor], numbers: dict[str, float]) -> tuple[Any, Any, Any]:
    """Rewards, normalised advantages and returns of each row's answer, from the definitions."""
    scores = out["rewards"].double().tolist()
    all_rewards, all_advantages, all_returns = [], [], []
    for row, score in enumerate(scores):
        columns = answer_columns(out, row)
        worth = score if out["finished"][row] else min(scores) - 1
        ratio = (out["logprobs"] - out["ref_logprobs"])[row].double().tolist()
        rewards = [-numbers["kl_ctl"] * ratio[c] for c in columns]
        rewards[-1] += max(-numbers["clip_reward_value"], min(numbers["clip_reward_value"], worth))
        values = [out["value"][row, c].item() for c in columns]
        advantages, ahead, next_value = [], 0.0, 0.0
        for reward, value in zip(reversed(rewards), reversed(values), strict=True):
            ahead = reward + numbers["gamma"] * next_value - value + numbers["gamma"] * numbers["lam"] * ahead
            next_value = value
            advantages.insert(0, ahead)
        all_rewards.append(rewards)
        all_advantages.append(advantages)
        all_returns.append([a + v for a, v in zip(advantages, values, strict=True)])
    flat = [a for row in all_advantages for a in row]
    mean = sum(flat) / len(flat)
    std = math.sqrt(sum((a - mean) ** 2 for a in flat) / len(flat))
    return all_rewards, [[(a - mean) / std for a in row] for row in all_advantages], all_returns


def test_the_numbers_that_are_set_on_the_trainer_are_those_of_the_objective() -> None:
    trainer = trainer_of(ppo_epochs=1)
    batch = prompt_batch(trainer.rlhf_engine)
    trainer.train_rlhf(trainer.generate_experience(batch))  # the actor is no longer its reference
    for name, value in NUMBERS.items():
        setattr(trainer, name, value)
    out = trainer.generate_experience(batch)
    for name, expected in zip(
        ("token_rewards", "advantages", "returns"), expected_objective(out, NUMBERS), strict=True
    ):
        for row, numbers in enumerate(expected):
            assert_near(out[name][row, answer_columns(out, row)], numbers, dtype=torch.float32)

    trainer.train_rlhf(out)  # moves the policy far from where the rollout began
    experience, roles = trainer._packed(out), trainer.engine.roles
    mask_T = experience.mask_T
    ratio_A = (roles.actor_logprobs(experience, temperature=1.0).logprobs_T - experience.old_logprobs_T)[
        mask_T
    ]
    value_A, old_A = roles.values(experience)[mask_T], experience.old_values_T[mask_T]
    surrogates, errors = [], []
    for log_ratio, advantage, value, old, target in zip(
        ratio_A.tolist(), experience.advantages_T[mask_T].tolist(), value_A.tolist(), old_A.tolist(),
        experience.returns_T[mask_T].tolist(), strict=True,
    ):  # fmt: skip
        ratio = math.exp(log_ratio)
        surrogates.append(max(-advantage * ratio, -advantage * min(max(ratio, 0.99), 1.01)))
        near = min(max(value, old - 0.02), old + 0.02)
        errors.append(0.5 * max((value - target) ** 2, (near - target) ** 2))
    actor_loss, critic_loss = trainer.train_rlhf(out)
    assert_near(actor_loss, sum(surrogates) / len(surrogates), dtype=torch.float32)
    assert_near(critic_loss, sum(errors) / len(errors), dtype=torch.float32)


def test_the_predecessor_s_numbers_are_the_default() -> None:
    trainer = trainer_of()
    found = {name: getattr(trainer, name) for name in NUMBERS}
    assert found == {
        "kl_ctl": 0.1, "clip_reward_value": 5.0, "cliprange": 0.2, "cliprange_value": 0.2, "gamma": 1.0, "lam": 0.95,
    }  # fmt: skip


def test_compute_rewards_of_a_subclass_decides_what_is_learned() -> None:
    class Longest(DeepSpeedPPOTrainer):
        def compute_rewards(
            self,
            prompts: Tensor,
            log_probs: Tensor,
            ref_log_probs: Tensor,
            reward_score: Tensor,
            action_mask: Tensor,
        ) -> Tensor:
            assert log_probs.shape == ref_log_probs.shape == action_mask.shape
            assert reward_score.shape == (len(prompts),)
            return torch.ones_like(log_probs)

    args = arguments()
    trainer = Longest(tiny(args), args)
    out = trainer.generate_experience(prompt_batch(trainer.rlhf_engine))
    undiscounted = out["returns"][0, answer_columns(out, 0)]
    value = out["value"][0, answer_columns(out, 0)[-1]]
    assert undiscounted[-1].item() == pytest.approx(1.0)
    assert torch.equal(out["token_rewards"], torch.ones_like(out["logprobs"]))
    assert value != 1.0


def test_get_advantages_and_returns_of_a_subclass_is_used() -> None:
    class Returns(DeepSpeedPPOTrainer):
        def get_advantages_and_returns(
            self, values: Tensor, rewards: Tensor, start: int
        ) -> tuple[Tensor, Tensor]:
            ahead = rewards[:, start:].flip(1).cumsum(1).flip(1)
            return ahead, ahead

    args = arguments()
    trainer = Returns(tiny(args), args)
    out = trainer.generate_experience(prompt_batch(trainer.rlhf_engine))
    for row in range(len(out["rewards"])):
        columns = answer_columns(out, row)
        total = out["token_rewards"][row, columns].sum().item()
        assert out["returns"][row, columns[0]].item() == pytest.approx(total, abs=1e-5)


def test_a_loss_of_a_subclass_is_what_its_role_learns() -> None:
    seen: list[tuple[Any, ...]] = []

    class Still(DeepSpeedPPOTrainer):
        def actor_loss_fn(
            self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor
        ) -> Tensor:
            seen.append((logprobs.shape, old_logprobs.shape, advantages.shape, mask.shape, mask.sum().item()))
            return 0.0 * logprobs.sum()

    args = arguments()
    trainer = Still(tiny(args), args)
    actor, critic = trainer.engine.roles.actor, trainer.engine.roles.critic
    before = weights(actor), weights(critic)
    out = trainer.generate_experience(prompt_batch(trainer.rlhf_engine))
    actor_loss, _ = trainer.train_rlhf(out)
    assert actor_loss.item() == 0.0
    assert same(before[0], weights(actor))
    assert not same(before[1], weights(critic))
    lengths = [len(answer_columns(out, row)) for row in range(len(out["rewards"]))]
    assert {shape for *shapes, _ in seen for shape in shapes} == {(len(lengths), max(lengths))}
    assert seen[0][-1] == sum(lengths)


def test_a_function_put_on_the_trainer_is_used_too(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_of()
    critic = trainer.engine.roles.critic
    before = weights(critic)
    monkeypatch.setattr(trainer, "critic_loss_fn", lambda values, *_: 0.0 * values.sum())
    trainer.train_rlhf(trainer.generate_experience(prompt_batch(trainer.rlhf_engine)))
    assert same(before, weights(critic))


def test_the_longest_answer_can_be_set_on_the_trainer() -> None:
    trainer = trainer_of()
    trainer.max_answer_seq_len = 2
    out = trainer.generate_experience(prompt_batch(trainer.rlhf_engine))
    assert out["input_ids"].shape[1] - out["prompts"].shape[1] == 2


@pytest.mark.parametrize("loss", [lambda *_: torch.zeros(3), lambda *_: 0.5], ids=["a row", "no tensor"])
def test_a_loss_that_is_no_number_is_refused_by_name(loss: Callable[..., Any]) -> None:
    trainer = trainer_of()
    trainer.critic_loss_fn = loss  # type: ignore[method-assign]
    loss.__name__ = "critic_loss_fn"
    out = trainer.generate_experience(prompt_batch(trainer.rlhf_engine))
    with pytest.raises(ConfigError, match="critic_loss_fn returned"):
        trainer.train_rlhf(out)


def test_rewards_of_another_shape_are_refused_by_name() -> None:
    trainer = trainer_of()
    trainer.compute_rewards = lambda *_: torch.zeros(2)  # type: ignore[method-assign]
    with pytest.raises(ConfigError, match=r"compute_rewards returned a tensor of shape \(2,\)"):
        trainer.generate_experience(prompt_batch(trainer.rlhf_engine))


@pytest.mark.parametrize("name", ["_generate_sequence", "_validate_training_mode"])
def test_an_override_that_nothing_calls_is_refused_by_name(name: str) -> None:
    args = arguments()
    kind = type("Mine", (DeepSpeedPPOTrainer,), {name: lambda self: None})
    with pytest.raises(ConfigError, match=rf"Mine\.{name} is never called"):
        kind(tiny(args), args)


def test_scores_that_change_after_the_rollout_are_refused() -> None:
    trainer = trainer_of()
    out = trainer.generate_experience(prompt_batch(trainer.rlhf_engine))
    out["rewards"] -= 1.0
    with pytest.raises(ConfigError, match="rewards were changed"):
        trainer.train_rlhf(out)


def test_a_batch_that_lacks_an_entry_is_refused() -> None:
    trainer = trainer_of()
    out = trainer.generate_experience(prompt_batch(trainer.rlhf_engine))
    del out["advantages"], out["finished"]
    with pytest.raises(ConfigError, match="no advantages, finished"):
        trainer.train_rlhf(out)


def test_answers_are_printed_at_their_interval(capsys: pytest.CaptureFixture[str]) -> None:
    trainer = trainer_of(print_answers=True, print_answers_interval=2)
    batch = prompt_batch(trainer.rlhf_engine)
    for step in range(3):
        trainer.generate_experience(batch["prompt"], batch["prompt_att_mask"], step)
    said = capsys.readouterr().err
    assert said.count("step 0, rank 0") == said.count("step 2, rank 0") == len(batch["prompt"])
    assert "step 1, rank 0" not in said
    assert "What is two plus two?" in said


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


def test_answers_are_drawn_from_the_seed_and_the_step() -> None:
    def drawn(seed: int, step: int) -> list[list[int]]:
        trainer = trainer_of(seed=seed)
        batch = prompt_batch(trainer.rlhf_engine)
        out = trainer.generate_experience(batch["prompt"], batch["prompt_att_mask"], step)
        found: list[list[int]] = out["input_ids"].tolist()
        return found

    assert drawn(5, 0) == drawn(5, 0)
    assert drawn(5, 0) != drawn(6, 0)
    assert drawn(5, 0) != drawn(5, 1)


@dataclass(frozen=True)
class First(World):
    """The first of two processes: `others` says what the second one has, where it is asked."""

    others: Any = None

    def gather(self, value: Any) -> list[Any]:
        theirs = self.others(value)
        return [value] if theirs is None else [value, theirs]


def test_the_rows_of_all_processes_are_one_batch() -> None:
    whole, part = trainer_of(), trainer_of()
    batch = prompt_batch(whole.rlhf_engine)
    out = whole.generate_experience(batch)
    first, second = (
        {name: rows[half] for name, rows in batch.items()} for half in (slice(3), slice(3, None))
    )
    prompts = unpadded(second["prompt"], second["prompt_att_mask"], None)
    part.world = First(others=lambda given: prompts if isinstance(given[0], list) else None)
    mine = part.generate_experience(first)
    for name, rows in mine.items():
        assert torch.equal(rows, out[name][:3]), name
    theirs = own_part({name: rows[3:] for name, rows in out.items()})
    part.world = First(others=lambda given: theirs)
    for found, expected in zip(part.train_rlhf(mine), whole.train_rlhf(out), strict=True):
        assert found.item() == expected.item()
    assert same(weights(part.engine.roles.actor), weights(whole.engine.roles.actor))


def test_without_text_as_many_small_batches_come_as_with_it() -> None:
    nothing = MiniDataset(max_size=2, small_batch_size=3)
    assert nothing.add([[None] * 6]) is None
    assert nothing.add([[None] * 6]) == [[[None] * 3]] * 4
    columns = MiniDataset(max_size=1, small_batch_size=2).add(([1, 2, 3], [4, 5, 6]))
    assert columns == [[[1, 2], [4, 5]], [[3], [6]]]
    whole = MiniDataset(max_size=1, small_batch_size=2).add(torch.tensor([1, 2, 3]))
    assert whole is not None
    assert [part.tolist() for part in whole] == [[1, 2], [3]]
