"""What the trainer gives and takes, in one process and as one of several."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from dovetail.errors import ConfigError
from dovetail.parallel.world import World
from dovetail.rlhf.compat.deepspeed_chat import (
    DeepSpeedPPOTrainer,
)
from dovetail.rlhf.compat.padding import own_part, unpadded
from tests.rlhf.compat.tiny import arguments, prompt_batch, same, tiny, trainer_of, weights


def test_the_longest_answer_can_be_set_on_the_trainer() -> None:
    trainer = trainer_of()
    trainer.max_answer_seq_len = 2
    out = trainer.generate_experience(prompt_batch(trainer.rlhf_engine))
    assert out["input_ids"].shape[1] - out["prompts"].shape[1] == 2


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
