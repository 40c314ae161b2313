"""Stages 1 and 2 with every setting off its default: the weights of whole runs, derived another way in float64."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from dovetail.config.model import LoraConfig
from dovetail.config.run import RunConfig
from dovetail.config.stages import OptimizerConfig
from dovetail.stages import pipeline, reward, supervised
from tests.by_definition import Learner, rate
from tests.fakes import byte_tokenizer
from tests.stages.runs import tiny_run, write_rows
from tests.tolerance import assert_all_near

SEED = 3
OPTIMIZER = {
    "learning_rate": 1e-2,
    "schedule": "linear",
    "warmup_steps": 2,
    "final_fraction": 0.3,
    "weight_decay": 0.4,
    "betas": (0.7, 0.8),
    "eps": 1e-3,
    "max_grad_norm": 0.6,
}
STAGE = {"batch_size": 4, "epochs": 1.5, "optimizer": OPTIMIZER, "save_every": 2, "eval_every": 2}
NUM_ROWS, NUM_STEPS = 10, 4
ADAPTERS = LoraConfig(rank=3, alpha=5.0, target_modules=("q_proj", "up_proj"))
ANSWERS = ["tea!", "a dog", "over there", "no", "the sea is red", "why", "one", "it is", "so", "stay"]


def question(i: int) -> str:
    return f"Say {ANSWERS[i]} {i}"


def token_ids(i: int, answer: str) -> tuple[list[int], list[bool]]:
    """A conversation in the default format, and which of its tokens the assistant wrote."""
    tokenizer = byte_tokenizer()
    start = tokenizer(f"\n\nHuman: {question(i)}\n\nAssistant:").input_ids
    ids = [*start, *tokenizer(f" {answer}").input_ids, tokenizer.eos_token_id]
    return ids, [place >= len(start) for place in range(len(ids))]


def order_of(step: int) -> list[int]:
    """The rows of a batch: one shuffled epoch after another, cut every four rows."""
    epochs = [np.random.default_rng([SEED, epoch]).permutation(NUM_ROWS) for epoch in range(2)]
    return np.concatenate(epochs)[4 * step : 4 * step + 4].tolist()


def sft_loss(learner: Learner, step: int) -> Tensor:
    """Cross-entropy per token of the answers."""
    rows = [token_ids(i, ANSWERS[i]) for i in order_of(step)]
    found = learner.logprobs([ids for ids, _ in rows], 1.0)
    return -torch.stack(
        [
            p
            for row, (_, mask) in zip(found, rows, strict=True)
            for p, m in zip(row, mask[1:], strict=True)
            if m
        ]
    ).mean()


def reward_loss(learner: Learner, step: int) -> Tensor:
    """-log sigmoid(chosen - rejected - margin), per pair."""
    rows = order_of(step)
    chosen, rejected = (
        learner.numbers([token_ids(i, answer(i))[0] for i in rows])
        for answer in (lambda i: ANSWERS[i], worse)
    )
    gaps = [c[-1] - r[-1] - margin(i) for c, r, i in zip(chosen, rejected, rows, strict=True)]
    return -logsigmoid(torch.stack(gaps)).mean()


def worse(i: int) -> str:
    return f"um {ANSWERS[-i]}"


def margin(i: int) -> float:
    return i / 4


def run_of(folder: Path, stage: str, lora: LoraConfig | None) -> RunConfig:
    rows = [
        {"prompt": question(i), "response": ANSWERS[i]}
        if stage == "sft"
        else {"prompt": question(i), "chosen": ANSWERS[i], "rejected": worse(i), "margin": margin(i)}
        for i in range(NUM_ROWS)
    ]
    file = write_rows(folder / "rows.jsonl", rows)
    source = {"path": str(file), "stages": [stage], "held_out": False}
    names = {"prompt": "prompt", "response": "response"} if stage == "sft" else {
        "prompt": "prompt", "chosen": "chosen", "rejected": "rejected", "margin": "margin"
    }  # fmt: skip
    config = tiny_run(folder, stages=(stage,), seed=SEED, **{stage: {"max_steps": None, **STAGE}})
    role = "actor" if stage == "sft" else "reward_model"
    return config.model_copy(
        update={
            "data": type(config.data)(blend=(source | names,), cache_dir=str(folder / "cache")),
            role: getattr(config, role).model_copy(update={"lora": lora}),
        }
    )


def reward_model(folder: str) -> Any:
    """The pretrained backbone under a head that is drawn from the run's seed."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float64)
    width = model.config.hidden_size
    head = torch.randn(1, width, generator=torch.Generator().manual_seed(SEED)) * (width + 1) ** -0.5
    model.score.weight.data = head.double()
    return model


def causal_lm(folder: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)


@pytest.fixture(autouse=True)
def uncentred_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reward model keeps its scores as they are at the end of the stage."""
    monkeypatch.setattr(reward, "centre_on_demonstrations", lambda *_: {})


STAGES: dict[str, tuple[Callable[[str], Any], Callable[[Learner, int], Tensor]]] = {
    "sft": (causal_lm, sft_loss),
    "reward": (reward_model, reward_loss),
}


@pytest.mark.parametrize("lora", [None, ADAPTERS], ids=["weights", "adapters"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_gives_the_weights_that_its_settings_say(
    stage: str, lora: LoraConfig | None, tmp_path: Path, first_weights: Mapping[str, Tensor]
) -> None:
    config = run_of(tmp_path, stage, lora)
    pipeline.run(config)
    start, loss = STAGES[stage]
    settings = OptimizerConfig(**OPTIMIZER)
    learner = Learner(start(config.actor.path), settings, lora, first_weights)
    if lora is None:
        assert_all_near(first_weights, learner.frozen)
    for step in range(NUM_STEPS):
        learner.step(loss(learner, step), rate(step, settings, NUM_STEPS))
    assert_all_near(load_file(tmp_path / "run" / stage / "model" / "model.safetensors"), learner.weights())


@pytest.mark.parametrize("stage", STAGES)
def test_the_adapters_of_a_stage_follow_from_the_seed_of_the_run(
    stage: str, tmp_path: Path, first_weights: dict[str, Tensor]
) -> None:
    drawn = []
    for seed in (SEED, SEED + 1, SEED):
        folder = tmp_path / f"run{len(drawn)}"
        config = run_of(tmp_path, stage, ADAPTERS)
        pipeline.run(config.model_copy(update={"seed": seed, "output_dir": str(folder)}))
        drawn.append({name: weight for name, weight in first_weights.items() if ".lora_A." in name})
    first, other, again = drawn
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


def test_dropout_of_adapters_acts_in_training(tmp_path: Path) -> None:
    weights = []
    for dropout in (0.0, 0.5):
        lora = ADAPTERS.model_copy(update={"dropout": dropout})
        config = run_of(tmp_path, "sft", lora).model_copy(update={"output_dir": str(tmp_path / str(dropout))})
        pipeline.run(config)
        weights.append(load_file(tmp_path / str(dropout) / "sft/model/model.safetensors"))
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_each_run_step_and_process_draws_dropout_of_its_own_and_always_the_same() -> None:
    draws = []
    for seed, step, rank in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0)):
        supervised.seed_step(seed, step, rank)
        draws.append(tuple(torch.rand(2).tolist()))
    assert draws[0] == draws[-1]
    assert len(set(draws)) == 4
