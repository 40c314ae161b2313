"""Direct preference optimisation with settings off their defaults: the weights of whole runs, derived in float64."""

import math
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from dovetail.config.model import LoraConfig
from dovetail.config.run import RunConfig
from dovetail.config.stages import OptimizerConfig
from dovetail.stages import pipeline
from tests.by_definition import Learner, rate
from tests.stages.runs import tiny_run, write_rows
from tests.stages.test_supervised_by_definition import (
    ADAPTERS,
    ANSWERS,
    NUM_ROWS,
    NUM_STEPS,
    OPTIMIZER,
    SEED,
    STAGE,
    order_of,
    question,
    token_ids,
)
from tests.tolerance import assert_all_near

BETA = 0.7
GAMMA = 0.3


def answers_of(i: int) -> list[str]:
    """Two or three answers, the best first."""
    return [ANSWERS[i], f"um {ANSWERS[-i]}", "so so"][: 2 + i % 2]


def run_of(folder: Path, lora: LoraConfig | None, **dpo: Any) -> RunConfig:
    rows = [
        {"prompt": question(i), "answers": answers_of(i), "ranks": list(range(len(answers_of(i))))}
        for i in range(NUM_ROWS)
    ]
    source = {
        "path": str(write_rows(folder / "rows.jsonl", rows)),
        "stages": ["reward"],
        "held_out": False,
        **{name: name for name in ("prompt", "answers", "ranks")},
    }
    settings = {
        "max_steps": None,
        "micro_batch_tokens": 90,
        "beta": BETA,
        "simpo_gamma": GAMMA,
        **STAGE,
        **dpo,
    }
    config = tiny_run(folder, algorithm="dpo", stages=("dpo",), seed=SEED, dpo=settings)
    return config.model_copy(
        update={
            "data": type(config.data)(blend=(source,), cache_dir=str(folder / "cache")),
            "actor": config.actor.model_copy(update={"lora": lora}),
        }
    )


class Scored:
    """Log-probabilities of answers under the learner as it is."""

    def __init__(self, learner: Learner) -> None:
        self.learner = learner

    def tokens(self, ids: list[int], mask: list[bool]) -> Tensor:
        """Of each token that is marked."""
        (found,) = self.learner.logprobs([ids], 1.0)
        return torch.stack([p for p, counts in zip(found, mask[1:], strict=True) if counts])

    def answer(self, i: int, answer: str) -> Tensor:
        return self.tokens(*token_ids(i, answer))

    def other(self, i: int) -> Tensor:
        """The answer of the next row to this row's prompt, no longer than the longest row."""
        other = (i + 1) % NUM_ROWS
        answer = answers_of(other)[i % len(answers_of(other))]
        ids, mask = token_ids(i, answer)
        longest = max(len(token_ids(k, text)[0]) for k in range(NUM_ROWS) for text in answers_of(k))
        return self.tokens(ids[:longest], mask[:longest])


def log_odds(mean: Tensor) -> Tensor:
    return torch.log(mean.exp() / (1 - mean.exp()))


def loss_of_pair(loss: str, now: tuple[Tensor, Tensor], before: tuple[Tensor, Tensor], kl: float) -> Tensor:
    """The equation of the paper, from the log-probabilities of all tokens of both answers, now and at the start."""
    ratios = [own.sum() - start.sum() for own, start in zip(now, before, strict=True)]
    means = [own.mean() for own in now]
    if loss == "ipo":
        chosen, rejected = (ratio / len(own) for ratio, own in zip(ratios, now, strict=True))
        return (chosen - rejected - 1 / (2 * BETA)) ** 2
    if loss == "kto":
        return 1 - (torch.sigmoid(BETA * (ratios[0] - kl)) + torch.sigmoid(BETA * (kl - ratios[1]))) / 2
    if loss == "simpo":
        return -torch.log(torch.sigmoid(BETA * (means[0] - means[1]) - GAMMA))
    if loss == "orpo":
        return -means[0] - BETA * torch.log(torch.sigmoid(log_odds(means[0]) - log_odds(means[1])))
    preferred = torch.sigmoid(BETA * (ratios[0] - ratios[1]))
    wrong = 0.1 if loss == "smoothed" else 0.0
    return -(1 - wrong) * torch.log(preferred) - wrong * torch.log(1 - preferred)


def loss_of_step(loss: str, learner: Learner, step: int, start: Mapping[Any, Tensor]) -> Tensor:
    """Each prompt counts once, whatever its number of pairs."""
    scored, rows = Scored(learner), order_of(step)
    with torch.no_grad():
        gaps = [float(scored.other(i).sum() - start[i].sum()) for i in rows] if loss == "kto" else [0.0]
    kl = max(0.0, math.fsum(gaps) / len(gaps))
    total = torch.zeros((), dtype=torch.float64)
    for i in rows:
        pairs = list(combinations(answers_of(i), 2))
        for pair in pairs:
            now = (scored.answer(i, pair[0]), scored.answer(i, pair[1]))
            before = (start[i, pair[0]], start[i, pair[1]])
            total = total + loss_of_pair(loss, now, before, kl) / len(pairs)
    return total / len(rows)


@pytest.mark.parametrize("lora", [None, ADAPTERS], ids=["weights", "adapters"])
@pytest.mark.parametrize("loss", ["sigmoid", "smoothed", "ipo", "kto", "simpo", "orpo"])
def test_the_stage_gives_the_weights_that_its_settings_say(
    loss: str, lora: LoraConfig | None, tmp_path: Path, first_weights: Mapping[str, Tensor]
) -> None:
    smoothed = {"loss": "sigmoid", "label_smoothing": 0.1}
    config = run_of(tmp_path, lora, **(smoothed if loss == "smoothed" else {"loss": loss}))
    pipeline.run(config)
    model = AutoModelForCausalLM.from_pretrained(config.actor.path, dtype=torch.float64)
    settings = OptimizerConfig(**OPTIMIZER)
    learner = Learner(model, settings, lora, first_weights)
    with torch.no_grad():
        scored = Scored(learner)
        start = {(i, text): scored.answer(i, text) for i in range(NUM_ROWS) for text in answers_of(i)}
        start |= {i: scored.other(i) for i in range(NUM_ROWS)}
    for step in range(NUM_STEPS):
        learner.step(loss_of_step(loss, learner, step, start), rate(step, settings, NUM_STEPS))
    found = load_file(tmp_path / "run/dpo/model/model.safetensors")
    # What the reference says is kept in float32, as PPO keeps it.
    assert_all_near({name: weight.float() for name, weight in found.items()}, learner.weights())
