"""The predecessor's two loops, with only the import changed."""

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from dovetail.rlhf import rollout
from dovetail.rlhf.compat import trainer as compat_trainer
from dovetail.rlhf.compat.deepspeed_chat import (
    DeepSpeedPPOTrainer,
    DeepSpeedPPOTrainerUnsupervised,
    MiniDataset,
    moving_average,
)
from dovetail.rlhf.rewards import Answer
from tests.rlhf.compat.tiny import arguments, prompt_batch, tiny
from tests.rlhf.tiny import PROMPTS


def test_the_loop_of_the_announcement_runs() -> None:
    args = arguments()
    engine = tiny(args)
    trainer = DeepSpeedPPOTrainer(engine=engine, args=args)
    before = engine.actor.get_input_embeddings().weight.detach().clone()
    prompt_train_dataloader = [prompt_batch(engine)] * 2
    for batch in prompt_train_dataloader:
        out = trainer.generate_experience(batch)
        actor_loss, critic_loss = trainer.train_rlhf(out)
        assert torch.isfinite(actor_loss)
        assert torch.isfinite(critic_loss)
    assert not torch.equal(before, engine.actor.get_input_embeddings().weight)


def test_the_loop_of_main_py_runs() -> None:
    args = arguments()
    rlhf_engine = tiny(args)
    trainer = DeepSpeedPPOTrainerUnsupervised(rlhf_engine, args)
    exp_mini_dataset = MiniDataset(args.generation_batches, args.per_device_training_batch_size)
    unsup_mini_dataset = MiniDataset(args.generation_batches, args.per_device_training_batch_size)
    text = torch.randint(0, 250, (6, 20), generator=torch.Generator().manual_seed(0))
    average_before = {k: v.clone() for k, v in rlhf_engine.actor_ema.state_dict().items()}
    for step in range(2):
        batch_prompt = prompt_batch(rlhf_engine)
        out = trainer.generate_experience(batch_prompt["prompt"], batch_prompt["prompt_att_mask"], step)
        exp_dataset = exp_mini_dataset.add(out)
        unsup_dataset = unsup_mini_dataset.add({"input_ids": text, "attention_mask": torch.ones_like(text)})
        assert exp_dataset is not None
        assert len(exp_dataset) == 2
        inner_iter, average_reward = 0, 0.0
        for _ in range(args.ppo_epochs):
            for exp_data, unsup_data in zip(exp_dataset, unsup_dataset, strict=True):
                actor_loss, critic_loss = trainer.train_rlhf(exp_data)
                average_reward += exp_data["rewards"].mean().item()
                unsup_loss = trainer.train_unsupervised(unsup_data, args.unsup_coef)
                inner_iter += 1
                moving_average(rlhf_engine.actor, rlhf_engine.actor_ema, zero_stage=args.actor_zero_stage)
                assert all(torch.isfinite(x) for x in (actor_loss, critic_loss, unsup_loss))
            random.Random(step).shuffle(exp_dataset)
        assert inner_iter == 4
    average = rlhf_engine.actor_ema.state_dict()
    assert all(tensor.dtype == torch.float32 for tensor in average.values())
    assert any(not torch.equal(average[name], average_before[name]) for name in average)


def test_the_padded_dictionary_holds_the_packed_experience() -> None:
    args = arguments()
    engine = tiny(args)
    trainer = DeepSpeedPPOTrainer(engine, args)
    out = trainer.generate_experience(prompt_batch(engine))
    experience = trainer._packed(out)
    roles = engine.engine.roles
    expected_T = roles.actor_logprobs(experience, temperature=1.0).logprobs_T
    torch.testing.assert_close(experience.old_logprobs_T, expected_T)
    torch.testing.assert_close(
        experience.old_values_T[experience.mask_T], roles.values(experience)[experience.mask_T]
    )
    width = out["prompts"].shape[1]
    for row, answer in enumerate(out["input_ids"][:, width:]):
        real = out["attention_mask"][row, width:].bool()
        assert answer[real].numel() >= 1
        assert out["logprobs"].shape == (len(PROMPTS), out["input_ids"].shape[1] - 1)


def test_what_is_learned_from_a_row_does_not_depend_on_the_rows_beside_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def complete_but_one(*given: Any, **how: Any) -> list[Answer]:
        answers = [replace(answer, finished=True) for answer in rollout.complete(*given, **how)]
        return [replace(answers[0], finished=False), *answers[1:]]

    monkeypatch.setattr(compat_trainer, "complete", complete_but_one)
    args = arguments()
    engine = tiny(args)
    trainer = DeepSpeedPPOTrainer(engine, args)
    out = trainer.generate_experience({name: rows[:4] for name, rows in prompt_batch(engine).items()})
    whole = trainer._packed(out)
    dealt = MiniDataset(max_size=1, small_batch_size=1).add(out)
    assert dealt is not None
    alone = [trainer._packed(row) for row in dealt]
    for name in ("rewards_T", "advantages_T", "returns_T"):
        assert torch.equal(torch.cat([getattr(row, name) for row in alone]), getattr(whole, name)), name
    # The actor is still its reference: no penalty is mixed into the rewards.
    worth = [row.rewards_T.sum().item() for row in alone]
    assert worth[1:] == pytest.approx(out["rewards"][1:].tolist())
    assert worth[0] == pytest.approx(out["rewards"].min().item() - 1)
    chosen_A = whole.advantages_T[whole.mask_T]
    assert chosen_A.mean().item() == pytest.approx(0, abs=1e-6)
    assert chosen_A.std(correction=0).item() == pytest.approx(1, rel=1e-4)
