"""A reward of your own: a Python function scores the answers, so no reward model is needed.

    python examples/own_reward.py ACTOR_FOLDER --steps 20

The function gets all answers of a batch and returns a number for each; higher is better. PPO raises the mean score and
pays for each step away from the model it began with.
"""

import argparse
from collections.abc import Sequence

from dovetail import PPOTrainer, RLHFEngine
from dovetail.config.stages import PpoConfig, SamplingConfig
from dovetail.rlhf.rewards import Answer

PROMPTS = ["Tell me a story.", "What is a good lunch?", "Describe the sea.", "How do I learn to draw?"]


def share_of_e(answers: Sequence[Answer]) -> list[float]:
    """Score the letter e: its share of the characters of each answer."""
    return [answer.text.count("e") / max(1, len(answer.text)) for answer in answers]


def train(engine: RLHFEngine, steps: int) -> list[float]:
    """Take PPO steps; returns the mean score of the answers before each."""
    trainer = PPOTrainer(engine)
    scores = []
    for step in range(steps):
        collected = trainer.generate_experience(PROMPTS * 8)
        trainer.train_rlhf(collected)
        scores.append(collected.stats["ppo/score_mean"])
        print(f"step {step}: mean score {scores[-1]:.4f}")
    return scores


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("actor", help="a folder or hub name of a causal language model")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    config = PpoConfig(sampling=SamplingConfig(max_new_tokens=32))
    engine = RLHFEngine(
        actor_model=options.actor, total_steps=options.steps, config=config, reward=share_of_e
    )
    train(engine, options.steps)


if __name__ == "__main__":
    main()
