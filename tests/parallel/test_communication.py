"""What processes receive is what docs/scaling.md and planning/traffic.py say."""

import json
from typing import Any

import pytest
import torch

from dovetail.model.lora import add_lora
from dovetail.planning.traffic import Exchanged, Work, stepped
from dovetail.planning.traffic import received as received_by
from tests.benchmarks.test_benchmarks import shapes
from tests.fakes import tiny_model
from tests.parallel.counting import ANSWER, PER_MICRO_BATCH, PROMPT
from tests.parallel.group import run_group

GRADIENT_STEPS = [[stage, micro_batches, "all"] for stage in range(4) for micro_batches in (1, 3)]
PPO_STEPS = [
    [0, 2, 0, "auto", "all"],
    [1, 2, 0, "auto", "all"],
    [2, 3, 0, "training", "all"],
    [3, 1, 0, "auto", "all"],
    [3, 2, 0, "training", "all"],
    [1, 2, 4, "training", "all"],
    [3, 2, 4, "auto", "all"],
]
HYBRID_GRADIENT_STEPS = [[stage, micro_batches, 2] for stage in (1, 2, 3) for micro_batches in (1, 3)]
HYBRID_PPO_STEPS = [[1, 2, 0, "auto", 2], [3, 2, 0, "training", 2], [2, 2, 4, "auto", 2]]
SIZE = 2
"""Processes that hold one copy."""


def counts_of(cases: list[Any], *, size: int) -> list[dict[str, int]]:
    codes, said = run_group(["tests.parallel.counting", json.dumps(cases)], size=size)
    assert codes == [0] * size, said
    assert "[{" in said[0], said
    found: list[dict[str, int]]
    found, _ = json.JSONDecoder().raw_decode(said[0][said[0].index("[{") :])  # torch may have words after it
    return found


@pytest.fixture(scope="module")
def received() -> list[dict[str, int]]:
    return counts_of(GRADIENT_STEPS + PPO_STEPS, size=SIZE)


@pytest.fixture(scope="module")
def hybrid_received() -> list[dict[str, int]]:
    return counts_of(HYBRID_GRADIENT_STEPS + HYBRID_PPO_STEPS, size=2 * SIZE)


@pytest.mark.slow
@pytest.mark.parametrize("case", range(len(GRADIENT_STEPS)))
def test_a_gradient_step_receives_what_the_formula_says(received: list[dict[str, int]], case: int) -> None:
    stage, m, _ = GRADIENT_STEPS[case]
    weights = sum(parameter.numel() * 4 for parameter in tiny_model().parameters())  # float32, all trained
    half = 1 / SIZE  # (N - 1) / N for two processes
    expected = {
        0: 2 * half * weights,
        1: half * (weights + weights),
        2: m * half * (weights + weights),
        3: m * half * (2 * weights + weights),
    }
    assert sum(received[case].values()) == expected[stage]
    assert half * stepped(Exchanged(weights, weights, stage), m) == expected[stage]


@pytest.mark.slow
@pytest.mark.parametrize("case", range(len(HYBRID_GRADIENT_STEPS)))
def test_only_sums_of_own_rows_come_from_other_copies_and_once_a_step(
    hybrid_received: list[dict[str, int]], case: int
) -> None:
    stage, m, _ = HYBRID_GRADIENT_STEPS[case]
    weights = sum(parameter.numel() * 4 for parameter in tiny_model().parameters())
    counts = hybrid_received[case]
    # of two copies, over two processes each: an all-reduce of half of the gradients brings half of that, twice
    assert counts.pop("allreduce") == 2 * (1 / 2) * weights / 2
    within = {1: 2 * weights, 2: m * 2 * weights, 3: m * 3 * weights}[stage] / 2
    assert sum(counts.values()) == within
    held = Exchanged(weights, weights, stage)
    work = Work(2 * SIZE, held, held, held, None, m, 0, shard_size=SIZE)
    assert work.across(held) == weights / 2
    assert work.share(held) * stepped(held, m) == within


@pytest.mark.slow
@pytest.mark.parametrize("case", range(len(PPO_STEPS)))
def test_a_ppo_step_receives_what_the_formula_says(received: list[dict[str, int]], case: int) -> None:
    expect_formula(received[len(GRADIENT_STEPS) + case], *PPO_STEPS[case], processes=SIZE)


@pytest.mark.slow
@pytest.mark.parametrize("case", range(len(HYBRID_PPO_STEPS)))
def test_a_ppo_step_of_two_copies_receives_what_the_formula_says(
    hybrid_received: list[dict[str, int]], case: int
) -> None:
    counts = hybrid_received[len(HYBRID_GRADIENT_STEPS) + case]
    expect_formula(counts, *HYBRID_PPO_STEPS[case], processes=2 * SIZE)


def expect_formula(counts: dict[str, int], *case: Any, processes: int) -> None:
    work = work_of(*case[:-1], processes=processes)
    num_tokens = work.tokens / (PROMPT + ANSWER) * ANSWER
    answers = counts["allgather"]
    assert sum(counts.values()) - answers == sum(received_by(work).values())
    others = (processes - 1) / processes
    assert 20 * num_tokens * others / 2 < answers < 40 * num_tokens * others / 2


def work_of(stage: int, micro_batches: int, lora: int, old_logprobs: str, *, processes: int) -> Any:
    """The models of tests/parallel/counting.py, as the formula sees them."""
    frozen = 3 if stage == 3 else 0
    actor: Any = shapes.causal_lm("tiny", torch.device("cpu"), torch.float32)
    reference = None if lora else Exchanged(num_bytes(actor, frozen), 0, frozen)
    if lora:
        actor = add_lora(actor, rank=lora, alpha=lora, seed=0)
    critic = shapes.scalar_model("tiny-350m", torch.device("cpu"), torch.float32)
    return Work(
        processes=processes,
        actor=Exchanged(num_bytes(actor, stage), num_bytes(actor, stage, trained=True), stage),
        critic=Exchanged(num_bytes(critic, stage), num_bytes(critic, stage), stage),
        reward=Exchanged(num_bytes(critic, frozen), 0, frozen),
        reference=reference,
        micro_batches=micro_batches,
        tokens=micro_batches * PER_MICRO_BATCH * processes * (PROMPT + ANSWER),
        scores_actor=old_logprobs == "training",
        shard_size=SIZE,
    )


def num_bytes(module: torch.nn.Module, stage: int, *, trained: bool = False) -> float:
    """Of float32 weights; sharded ones are sent with their rows filled up to a multiple of the processes."""
    filled = SIZE if stage else 1
    return sum(
        -(-len(weight) // filled) * filled * weight[0].numel() * 4
        for weight in module.parameters()
        if weight.requires_grad or not trained
    )
