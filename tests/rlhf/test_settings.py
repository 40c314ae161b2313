"""Each setting of PPO reaches the place where it acts: whole runs with all of them off their defaults.

The judge is by_definition.py, in float64. A setting that no case moves off its default fails, so the table is complete.
"""

import copy
import math
from typing import Any

import pytest
import torch
from pydantic import BaseModel

from dovetail.batches import PackedBatch, pack
from dovetail.config.model import LoraConfig
from dovetail.config.stages import PpoConfig
from dovetail.rlhf.api import PPOTrainer, RLHFEngine
from dovetail.rlhf.build import Setup
from dovetail.training.weights import trained_weights
from tests.by_definition import Learner, Row
from tests.fakes import byte_tokenizer, tiny_model
from tests.rlhf.by_definition import Ppo, scores_of
from tests.rlhf.tiny import OFF_DEFAULT, PROMPTS, draw_from_another_policy, end_often, tiny_reward_model
from tests.tolerance import assert_all_near

SEED = 5
ONE_STEP = {"minibatches": 1, "ppo_epochs": 1}
CASES: dict[str, dict[str, Any]] = {
    "every setting": {},
    "what is null": {
        "value_clip": None, "importance_cap": None, "score_clip": None, "missing_end_penalty": None, "kl_target": None,
    },
    "the lowest score": {"missing_end_penalty": None, "whiten_rewards": False},
    "one step from the generator's numbers": {**ONE_STEP, "old_logprobs": "generation"},
    "one step": {**ONE_STEP, "old_logprobs": "training"},
    "cut-off answers with their scores": {"cut_off_answers": "keep_score"},
    "cut-off answers left out": {"cut_off_answers": "leave_out"},
    "steps end with the first that is far": {"approx_kl_stop": 0.2},
    "the ratio of a bad action is bounded": {"dual_clip": 1.3},
    "the critic first": {"critic_warmup_rollouts": 3, "critic_warmup_learning_rate": 2e-2},
    "the critic first, at its own rate": {**ONE_STEP, "critic_warmup_rollouts": 1, "old_logprobs": "generation"},
}  # fmt: skip
ADAPTERS = (
    LoraConfig(rank=3, alpha=5.0, target_modules=("q_proj", "down_proj")),
    LoraConfig(rank=2, alpha=7.0),
)
NOT_IN_THE_WEIGHTS = {
    "micro_batch_tokens", "activation_checkpointing", "offload_while_generating", "eval_every", "save_every",
    "keep_checkpoints", "kl_limit", "kl_stop", "print_samples_every", "eval_tasks",
}  # fmt: skip
OF_THE_STAGE = {
    "max_steps",
    "ptx_batch_size",
    "reward_function",
    "reward_function_weight",
    "curriculum_score",
    "standardise_scores",
    "environment",
}
"""tests/stages/test_ppo_by_definition.py has the first four of these; the others have tests of their own, in
test_prompt_queue.py and test_score_scale.py beside it and in test_episodes.py."""


def settings_of(config: BaseModel, prefix: str = "") -> dict[str, Any]:
    """Dotted name -> value, of all settings."""
    found: dict[str, Any] = {}
    for name, value in config:
        inner = isinstance(value, BaseModel)
        found |= settings_of(value, f"{prefix}{name}.") if inner else {prefix + name: value}
    return found


def config_of(case: str) -> PpoConfig:
    return PpoConfig(**{**OFF_DEFAULT, **CASES[case]})


def test_every_setting_that_acts_on_the_weights_is_off_its_default_in_some_case() -> None:
    default = settings_of(PpoConfig())
    moved = {
        name
        for case in CASES
        for name, value in settings_of(config_of(case)).items()
        if value != default[name]
    }
    assert default.keys() - moved == NOT_IN_THE_WEIGHTS | OF_THE_STAGE


def texts_of(step: int) -> list[Row]:
    """Two texts for a step, with a token that is not learnt."""
    rows = [[10 + step, 20, 30, 40], [50, 60 + 2 * step, 70]]
    return [(ids, [False, *[True] * (len(ids) - 2), step % 2 == 0]) for ids in rows]


def packed_texts(step: int) -> PackedBatch:
    rows = texts_of(step)
    return pack([ids for ids, _ in rows], [mask for _, mask in rows])


@pytest.mark.parametrize(
    ("case", "adapters"),
    [*((case, (None, None)) for case in CASES), ("every setting", ADAPTERS)],
    ids=[*CASES, "every setting, adapters"],
)
def test_two_rollouts_give_the_weights_average_and_coefficient_of_the_equations(
    case: str, adapters: tuple[LoraConfig | None, LoraConfig | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, num_rollouts = config_of(case), 10 if CASES[case].get("critic_warmup_rollouts") else 3
    models = end_often(tiny_model(dtype=torch.float64)), tiny_reward_model("llama", torch.float64)
    plain = copy.deepcopy(models)
    engine = RLHFEngine(
        actor_model=models[0],
        critic_model=models[1],
        tokenizer=byte_tokenizer(),
        total_steps=num_rollouts * config.ppo_epochs * config.minibatches,
        config=config,
        setup=Setup(device="cpu", seed=SEED, actor_lora=adapters[0], critic_lora=adapters[1]),
    )
    roles = engine.roles
    actor = Learner(plain[0], config.actor_optimizer, adapters[0], trained_weights(roles.actor))
    critic = Learner(plain[1], config.critic_optimizer, adapters[1], trained_weights(roles.critic))
    scorer = Learner(plain[1], config.critic_optimizer)
    expected = Ppo(config, actor, critic, score=scores_of(scorer), num_rollouts=num_rollouts, seed=SEED)
    draw_from_another_policy(monkeypatch)
    trainer = PPOTrainer(engine)
    for _ in range(2):
        collected = trainer.generate_experience([*PROMPTS, "one more"])  # seven do not divide into three
        expected.learn(collected.answers, texts_of)
        trainer.update(collected, next_texts=packed_texts)
    assert_all_near(trained_weights(roles.actor), actor.trained)
    assert_all_near(trained_weights(roles.critic), critic.trained)
    assert_all_near(engine.learners.ema.averages(), expected.average)
    assert trainer.kl_coefficient == pytest.approx(expected.beta, rel=1e-6)
    if case == "every setting":
        assert_all_acts(expected)


def assert_all_acts(run: Ppo) -> None:
    """Each limit cuts something off."""
    config = run.config
    limits = {
        "ratio": config.ratio_clip,
        "value": config.value_clip,
        "score": config.score_clip,
        "weight": config.importance_cap,
        "actor": config.actor_optimizer.max_grad_norm,
        "critic": config.critic_optimizer.max_grad_norm,
    }
    assert [name for name, limit in limits.items() if run.seen[name] <= (limit or 0.0)] == []
    assert run.seen["weight"] < math.exp(
        0.0501
    )  # the generator draws at the temperature that training scores with
