"""A rollout asks further prompts in the place of those that teach nothing: which, how many, and how often."""

from collections.abc import Sequence

import pytest

from dovetail.batches import Experience
from dovetail.config.policy import PolicyConfig
from dovetail.config.stages import SamplingConfig
from dovetail.rlhf.algorithms.named import algorithm_named
from dovetail.rlhf.api import PPOTrainer, RLHFEngine
from dovetail.rlhf.build import Setup
from dovetail.rlhf.rewards import Answer
from dovetail.rlhf.rollout import Collected
from tests.fakes import byte_tokenizer, tiny_model
from tests.rlhf.tiny import tiny_config

SIZE = 3


def useful_or_not(answers: Sequence[Answer]) -> list[float]:
    """Answers to prompts with an x all score 1 in half of them and 0 in the others; elsewhere they differ."""
    found = []
    for place, answer in enumerate(answers):
        asked = answer.messages[-1]["content"]
        found.append(float("xx" in asked) if "x" in asked else float(place % SIZE == 1))
    return found


def trainer_of(
    name: str = "dapo", *, num_prompts: int = 3, leave_out: bool = False, **policy: object
) -> PPOTrainer:
    config = tiny_config(
        batch_size=num_prompts * SIZE,
        cut_off_answers="leave_out" if leave_out else "keep_score",
        sampling=SamplingConfig(max_new_tokens=4),
    )
    engine = RLHFEngine(
        actor_model=tiny_model(),
        tokenizer=byte_tokenizer(),
        total_steps=4,
        config=config,
        reward=useful_or_not,
        setup=Setup(device="cpu"),
        algorithm=algorithm_named(name, PolicyConfig(answers_per_prompt=SIZE, **policy), config),
    )
    return PPOTrainer(engine)


class Queue:
    """Prompts one after another, and how many were taken each time."""

    def __init__(self, *prompts: str) -> None:
        self.prompts, self.taken = list(prompts), list[int]()

    def take(self, count: int) -> list[str]:
        self.taken.append(count)
        taken, self.prompts = self.prompts[:count], self.prompts[count:]
        return taken


def asked_of(collected: Collected) -> list[str]:
    """The prompt of each group of answers."""
    prompts = [answer.messages[-1]["content"] for answer in collected.answers]
    assert prompts == [prompt for prompt in prompts[::SIZE] for _ in range(SIZE)]
    return prompts[::SIZE]


def learnt_of(experience: Experience) -> list[bool]:
    """Whether each group of answers is learnt from."""
    return [any(experience.target_counts[i : i + SIZE]) for i in range(0, experience.num_sequences, SIZE)]


def test_prompts_that_teach_nothing_are_replaced_until_the_batch_is_full() -> None:
    trainer, queue = trainer_of(), Queue("x1", "a", "xx2", "x3", "b", "xx4", "c", "d")
    collected = trainer.generate_experience(queue.take(3), more=queue.take)
    assert queue.taken == [3, 2, 1, 1]
    assert queue.prompts == ["d"]
    assert asked_of(collected) == ["a", "b", "c"]
    assert learnt_of(collected.experience) == [True, True, True]
    stats = collected.stats
    assert (stats["ppo/refill_rounds"], stats["ppo/prompts_asked"], stats["ppo/unfilled_fraction"]) == (
        3,
        7,
        0,
    )
    # Of what nobody selected: a group of zeros, one of (0, 1, 0), one of ones.
    assert stats["ppo/score_mean"] == pytest.approx(4 / 9)
    assert collected.sampled_scores_S.tolist() == [
        0,
        0,
        0,
        0,
        1,
        0,
        1,
        1,
        1,
        0,
        0,
        0,
        0,
        1,
        0,
        1,
        1,
        1,
        0,
        1,
        0,
    ]
    assert collected.experience.scores_S.tolist() == [0, 1, 0] * 3
    assert len({answer.answer_ids for answer in collected.answers}) == 9


def test_after_the_last_round_the_run_goes_on_with_what_it_has_and_says_so() -> None:
    trainer, queue = trainer_of(refill_rounds=2), Queue(*[f"x{i}" for i in range(4)], "a", *["x"] * 9)
    collected = trainer.generate_experience(queue.take(3), more=queue.take)
    assert queue.taken == [3, 3, 2]
    assert asked_of(collected) == ["x0", "x1", "a"]
    assert learnt_of(collected.experience) == [False, False, True]
    assert collected.stats["ppo/unfilled_fraction"] == pytest.approx(2 / 3)
    assert collected.stats["ppo/refill_rounds"] == 2
    assert trainer.update(collected).stats["ppo/actor_steps"] == 1


def test_a_rollout_without_any_signal_takes_no_step() -> None:
    trainer, queue = trainer_of(refill_rounds=1), Queue(*["x"] * 9)
    collected = trainer.generate_experience(queue.take(3), more=queue.take)
    assert collected.stats["ppo/unfilled_fraction"] == 1.0
    assert trainer.update(collected).stats["ppo/actor_steps"] == 0


@pytest.mark.parametrize(
    ("name", "policy", "leave_out", "taken"),
    [
        ("dapo", {"refill_rounds": 0}, False, [3]),
        ("grpo", {}, False, [3]),
        ("grpo", {"refill_rounds": 5}, False, [3]),  # it learns from all
        ("grpo", {"refill_rounds": 2}, True, [3, 3, 3]),  # all answers are cut off, and those are left out
        ("rloo", {"refill_rounds": 5, "drop_equal_groups": True}, False, [3, 2, 1]),
    ],
)
def test_what_a_method_learns_from_decides(
    name: str, policy: dict[str, object], leave_out: bool, taken: list[int]
) -> None:
    trainer, queue = (
        trainer_of(name, leave_out=leave_out, **policy),
        Queue("x1", "a", "x2", "b", "x3", "c", *"ddd"),
    )
    trainer.generate_experience(queue.take(3), more=queue.take)
    assert queue.taken == taken


def test_the_first_round_is_the_rollout_without_refills() -> None:
    prompts = ("a", "b", "c")
    without = trainer_of("grpo").generate_experience(prompts)
    assert trainer_of().generate_experience(prompts, more=Queue().take).answers == without.answers
