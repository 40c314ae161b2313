"""What processes receive is what docs/scaling.md and benchmarks/scaling_model.py say."""

import json
from typing import Any

import pytest
import torch

from dovetail.model.lora import add_lora
from tests.benchmarks.test_benchmarks import load, shapes
from tests.fakes import tiny_model
from tests.parallel.counting import ANSWER, PER_MICRO_BATCH, PROMPT
from tests.parallel.group import run_group

model: Any = load("scaling_model")

GRADIENT_STEPS = [[stage, micro_batches] for stage in range(4) for micro_batches in (1, 3)]
PPO_STEPS = [
    [0, 2, 0, "auto"],
    [1, 2, 0, "auto"],
    [2, 3, 0, "training"],
    [3, 1, 0, "auto"],
    [3, 2, 0, "training"],
    [1, 2, 4, "training"],
    [3, 2, 4, "auto"],
]
SIZE = 2


@pytest.fixture(scope="module")
def received() -> list[dict[str, int]]:
    cases = json.dumps(GRADIENT_STEPS + PPO_STEPS)
    codes, said = run_group(["tests.parallel.counting", cases], size=SIZE)
    assert codes == [0] * SIZE, said
    found: list[dict[str, int]] = json.loads(said[0][said[0].index("[{") :])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("case", range(len(GRADIENT_STEPS)))
def test_a_gradient_step_receives_what_the_formula_says(received: list[dict[str, int]], case: int) -> None:
    stage, m = GRADIENT_STEPS[case]
    weights = sum(parameter.numel() * 4 for parameter in tiny_model().parameters())  # float32, all trained
    half = 1 / SIZE  # (N - 1) / N for two processes
    expected = {
        0: 2 * half * weights,
        1: half * (weights + weights),
        2: m * half * (weights + weights),
        3: m * half * (2 * weights + weights),
    }
    assert sum(received[case].values()) == expected[stage]
    assert half * model.stepped(model.Held(weights, weights, stage), m) == expected[stage]


@pytest.mark.slow
@pytest.mark.parametrize("case", range(len(PPO_STEPS)))
def test_a_ppo_step_receives_what_the_formula_says(received: list[dict[str, int]], case: int) -> None:
    counts = received[len(GRADIENT_STEPS) + case]
    work = work_of(*PPO_STEPS[case])
    answers = counts.pop("allgather")
    assert sum(counts.values()) == sum(model.received(work).values())
    num_tokens = work.tokens / (PROMPT + ANSWER) * ANSWER
    assert 10 * num_tokens / SIZE < answers < 20 * num_tokens / SIZE


def work_of(stage: int, micro_batches: int, lora: int, old_logprobs: str) -> Any:
    """The models of tests/parallel/counting.py, as the formula sees them."""
    frozen = 3 if stage == 3 else 0
    actor: Any = shapes.causal_lm("tiny", torch.device("cpu"), torch.float32)
    reference = None if lora else model.Held(num_bytes(actor, frozen), 0, frozen)
    if lora:
        actor = add_lora(actor, rank=lora, alpha=lora, seed=0)
    critic = shapes.scalar_model("tiny-350m", torch.device("cpu"), torch.float32)
    return model.Work(
        processes=SIZE,
        actor=model.Held(num_bytes(actor, stage), num_bytes(actor, stage, trained=True), stage),
        critic=model.Held(num_bytes(critic, stage), num_bytes(critic, stage), stage),
        reward=model.Held(num_bytes(critic, frozen), 0, frozen),
        reference=reference,
        micro_batches=micro_batches,
        tokens=micro_batches * PER_MICRO_BATCH * SIZE * (PROMPT + ANSWER),
        scores_actor=old_logprobs == "training",
    )


def num_bytes(module: torch.nn.Module, stage: int, *, trained: bool = False) -> float:
    """Of float32 weights; sharded ones are sent with their rows filled up to a multiple of the processes."""
    filled = SIZE if stage else 1
    return sum(
        -(-len(weight) // filled) * filled * weight[0].numel() * 4
        for weight in module.parameters()
        if weight.requires_grad or not trained
    )
