"""Stage 3 from the results of stages 1 and 2, with every setting off its default: derived another way in float64.

The run ends twice in its middle and goes on. tests/rlhf/by_definition.py is the judge.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from dovetail.config.run import RunConfig
from dovetail.config.stages import PpoConfig
from dovetail.model import placement
from dovetail.model.save import save_model
from dovetail.rlhf.api import PPOTrainer
from dovetail.rlhf.evaluation import Judged
from dovetail.rlhf.rewards import Answer
from dovetail.rlhf.rollout import Collected
from dovetail.stages import pipeline, ppo
from dovetail.stages.context import Context
from dovetail.stages.guard import MEASURES, Guard
from dovetail.training.weights import trained_weights
from tests.by_definition import Learner, Row, float32
from tests.fakes import byte_tokenizer, tiny_model
from tests.rlhf.by_definition import END_ID, Ppo, scores_of
from tests.rlhf.tiny import OFF_DEFAULT, end_often
from tests.stages.runs import tiny_run
from tests.tolerance import assert_all_near

SEED, BATCH, TEXTS, WEIGHT = 3, 4, 3, 0.25
PPO = OFF_DEFAULT | {
    "batch_size": BATCH,
    "minibatches": 2,
    "ptx_batch_size": TEXTS,
    "save_every": 1,
    "eval_every": 3,
}
WARMUP = {"max_steps": 10, "critic_warmup_rollouts": 1, "critic_warmup_learning_rate": 2e-2}
"""The critic alone for one rollout of ten."""
ADAPTERS = {
    "actor": {"lora": {"rank": 3, "alpha": 5.0, "target_modules": ("q_proj", "down_proj")}},
    "reward_model": {"lora": {"rank": 2, "alpha": 7.0}},
}
JUDGE = """
def score(answers):
    return [0.3 * len(answer.answer_ids) - 1 for answer in answers]
"""


class Ended(Exception):
    """The end of a process."""


class Run:
    """A run of all stages in float64, and what it showed: its rollouts, and the weights before the first of them."""

    def __init__(
        self, config: RunConfig, monkeypatch: pytest.MonkeyPatch, *, ends_after: Sequence[int]
    ) -> None:
        self.config, self.folder = config, Path(config.output_dir)
        self.rollouts: list[list[Answer]] = []
        self.first: dict[str, dict[str, Tensor]] = {}
        self.trainer: Any = None
        self.judged: list[Judged] = []
        self.guards: list[Guard] = []
        self.ends_after = list(ends_after)
        self.watch(monkeypatch)
        monkeypatch.setitem(placement._DTYPES, "fp32", torch.float64)
        for _ in ends_after:
            with pytest.raises(Ended):
                pipeline.run(config)
        pipeline.run(config)

    def watch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        generate, save = PPOTrainer.generate_experience, Context.save_if_due
        judge = ppo.evaluate_answers

        def generate_experience(trainer: PPOTrainer, prompts: Any, **options: Any) -> Collected:
            self.trainer = trainer
            if not self.rollouts:
                for role in ("actor", "critic"):
                    weights = trained_weights(getattr(trainer.engine.roles, role))
                    self.first[role] = {name: weight.clone() for name, weight in weights.items()}
            collected = generate(trainer, prompts, **options)
            self.rollouts.append(collected.answers)
            return collected

        def save_if_due(context: Context, checkpoints: Any, *rest: Any, done: int, **options: Any) -> None:
            save(context, checkpoints, *rest, done=done, **options)
            if checkpoints.folder.parent.name == "ppo" and done in self.ends_after:
                self.ends_after.remove(done)
                checkpoints.finish()
                raise Ended

        def evaluate_answers(*rest: Any) -> Judged:
            self.judged.append(judge(*rest))
            return self.judged[-1]

        def guard(config: PpoConfig) -> Guard:
            self.guards.append(Guard(config))
            return self.guards[-1]

        monkeypatch.setattr(ppo, "Guard", guard)
        monkeypatch.setattr(ppo, "evaluate_answers", evaluate_answers)
        monkeypatch.setattr(PPOTrainer, "generate_experience", generate_experience)
        monkeypatch.setattr(Context, "save_if_due", save_if_due)

    def model(self, auto: Any, stage: str) -> Any:
        """What a stage left, as anybody loads it."""
        return auto.from_pretrained(self.folder / stage / "model", dtype=torch.float64)

    def saved(self, folder: str) -> dict[str, Tensor]:
        return load_file(self.folder / folder / "model.safetensors")

    def by_definition(self, *, has_function: bool) -> Ppo:
        """The same stage from the same models and answers, by the equations."""
        config = self.config.ppo
        actor, reward_model = (
            self.model(auto, stage)
            for auto, stage in ((AutoModelForCausalLM, "sft"), (AutoModelForSequenceClassification, "reward"))
        )
        critic_lora = self.config.reward_start().lora
        scores = scores_of(Learner(reward_model, config.critic_optimizer))

        def score(answers: Sequence[Answer]) -> list[float]:
            """The reward model's, within its limits, and the function's beside it, which has none."""
            limit = config.score_clip or 0.0
            pairs = zip(answers, scores(answers), strict=True)
            return [
                float32(max(-limit, min(limit, own))) + WEIGHT * float32(0.3 * len(answer.answer_ids) - 1)
                for answer, own in pairs
            ]

        expected = Ppo(
            config.model_copy(update={"score_clip": None}) if has_function else config,
            Learner(actor, config.actor_optimizer, self.config.actor.lora, self.first["actor"]),
            Learner(reward_model, config.critic_optimizer, critic_lora, self.first["critic"]),
            score=score if has_function else scores,
            num_rollouts=len(self.rollouts),
            seed=SEED,
        )
        self.expect_objective(self.judged[0], expected)
        for answers in self.rollouts:
            expected.learn(answers, self.texts_of)
        self.expect_objective(self.judged[-1], expected)
        return expected

    def expect_objective(self, judged: Judged, expected: Ppo) -> None:
        """The held-out objective is the one that is trained."""
        found = judged.stats["ppo/held_out_objective"]
        assert found == pytest.approx(expected.objective(judged.answers), rel=1e-6)

    def texts_of(self, step: int) -> list[Row]:
        """The texts of an optimiser step; every token of them is learnt but the first."""
        texts = [row["text"] for row in rows_of(self.config.data.pretraining[0].path)]
        tokenizer = byte_tokenizer()
        rows = [[*tokenizer(texts[i]).input_ids, END_ID] for i in shuffled(len(texts), TEXTS, step)]
        return [(ids, [True] * len(ids)) for ids in rows]

    def prompts_of(self, rollout: int) -> list[str]:
        source = next(s for s in self.config.data.blend if s.stages == ("ppo",) and not s.held_out)
        prompts = [row["prompt"] for row in rows_of(source.path)]
        return [prompts[i] for i in shuffled(len(prompts), BATCH, rollout)]


def rows_of(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def shuffled(num_rows: int, size: int, step: int) -> list[int]:
    """The rows of a batch: one shuffled epoch after another, cut into pieces."""
    epochs = [np.random.default_rng([SEED, epoch]).permutation(num_rows) for epoch in range(20)]
    return np.concatenate(epochs)[size * step : size * (step + 1)].tolist()


@pytest.mark.parametrize("has_function", [False, True])
def test_stage_3_gives_the_weights_average_and_coefficient_of_the_equations(
    has_function: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(end_often(tiny_model()), byte_tokenizer(), tmp_path / "model-llama")
    (tmp_path / "judge.py").write_text(JUDGE)
    both = {"reward_function": f"{tmp_path / 'judge.py'}:score", "reward_function_weight": WEIGHT}
    changes = {"ppo": PPO | both | {"max_steps": None}} if has_function else {"ppo": PPO | WARMUP, **ADAPTERS}
    config = tiny_run(tmp_path, seed=SEED, **changes)
    run = Run(config, monkeypatch, ends_after=[1] if has_function else [1, 6])
    expected = run.by_definition(has_function=has_function)
    for rollout, answers in enumerate(run.rollouts):
        assert [answer.messages[-1]["content"] for answer in answers] == run.prompts_of(rollout)
    assert len(run.rollouts) == (2 if has_function else 10)
    roles, learners = run.trainer.engine.roles, run.trainer.engine.learners
    assert_all_near(trained_weights(roles.actor), expected.actor.trained)
    assert_all_near(trained_weights(roles.critic), expected.critic.trained)
    assert_all_near(learners.ema.averages(), expected.average)
    assert run.trainer.kl_coefficient == pytest.approx(expected.beta, rel=1e-6)
    rows = [row for row in rows_of(str(run.folder / "metrics.jsonl")) if "ppo/score_mean" in row]
    assert run.guards[-1].first == {name: rows[0][f"ppo/{name}"] for name in MEASURES}
    assert_all_near(run.saved("ppo/model"), expected.actor.weights())
    average = run.saved("ppo/model_ema")
    assert {weight.dtype for weight in average.values()} == {torch.float32}
    assert_all_near(average, expected.actor.weights(expected.average))
