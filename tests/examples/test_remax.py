"""The documented example builds an algorithm that we do not ship, in under 60 lines, and it learns."""

import importlib.util
from pathlib import Path
from types import ModuleType

from dovetail.config.stages import OptimizerConfig, PpoConfig, SamplingConfig
from dovetail.rlhf.api import RLHFEngine
from dovetail.rlhf.build import Setup
from tests.fakes import byte_tokenizer, tiny_model

EXAMPLE = Path(__file__).parents[2] / "examples" / "remax.py"


def load_example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("remax", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_example_stays_under_sixty_lines() -> None:
    lines = [line for line in EXAMPLE.read_text(encoding="utf-8").splitlines() if line.strip()]
    assert len(lines) < 60


def test_the_example_raises_the_reward_it_is_given() -> None:
    config = PpoConfig(
        sampling=SamplingConfig(max_new_tokens=16),
        actor_optimizer=OptimizerConfig(learning_rate=5e-3, schedule="constant"),
    )
    engine = RLHFEngine(
        actor_model=tiny_model(),
        tokenizer=byte_tokenizer(),
        total_steps=30,
        config=config,
        reward=lambda answers: [sum(40 <= i < 90 for i in a.answer_ids) / len(a.answer_ids) for a in answers],
        setup=Setup(device="cpu"),
    )
    remax_step = load_example().remax_step
    rewards = [remax_step(engine, ["Tell me a story."] * 24, seed) for seed in range(30)]
    # Five steps draw 1,920 tokens, so each mean has a standard error of 0.01: this is five of their difference's.
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.07
