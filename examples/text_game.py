"""A text game as an environment: the model guesses a number, and is told after each guess where to look.

    python examples/text_game.py ACTOR_FOLDER --steps 50
    dovetail ppo my_recipe.yaml ppo.environment=examples/text_game.py:GuessTheNumber ppo.environment.max_turns=6

A class with `reset` and `step` is an environment. Every episode has an object of its own, so it may keep what it needs.
"""

import argparse
import re
from typing import Any

from dovetail import PPOTrainer, RLHFEngine
from dovetail.config.stages import EnvironmentConfig, PpoConfig, SamplingConfig
from dovetail.rlhf.environments import Step, Turn

HIGHEST = 20
PROMPT = "Let us play a game. Answer each time with one number and nothing else."


class GuessTheNumber:
    """A game of higher and lower. A guess that the hints allow earns a little, the right one more."""

    def reset(self, row: dict[str, Any], seed: int) -> str:
        """Think of a number; the answers to one prompt get the same seed, and so the same number."""
        self.number = seed % HIGHEST + 1
        self.low, self.high = 1, HIGHEST
        return f"I think of a number from 1 to {HIGHEST}. Which is it?"

    def step(self, turn: Turn) -> Step:
        """Judge a guess."""
        found = re.search(r"\d+", turn.text)
        if found is None:
            return Step("That is no number. Guess again.")
        guess = int(found[0])
        if guess == self.number:
            return Step(reward=1.0, done=True)
        is_sensible = self.low <= guess <= self.high
        if guess < self.number:
            self.low = max(self.low, guess + 1)
        else:
            self.high = min(self.high, guess - 1)
        hint = "higher" if guess < self.number else "lower"
        return Step(f"My number is {hint} than {guess}. Guess again.", reward=0.1 * is_sensible)


def train(engine: RLHFEngine, steps: int) -> list[float]:
    """Take PPO steps; returns the mean reward of the episodes before each."""
    trainer = PPOTrainer(engine)
    rewards = []
    for step in range(steps):
        collected = trainer.generate_experience([PROMPT] * engine.config.batch_size)
        trainer.train_rlhf(collected)
        rewards.append(collected.stats["reward/environment_mean"])
        turns = collected.stats["environment/turns_mean"]
        print(f"step {step}: reward {rewards[-1]:.3f} in {turns:.2f} turns")
    return rewards


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("actor", help="a folder or hub name of a chat model")
    parser.add_argument("--steps", type=int, default=50)
    options = parser.parse_args()
    config = PpoConfig(
        sampling=SamplingConfig(max_new_tokens=256),
        environment=EnvironmentConfig(source="GuessTheNumber", max_turns=6),
        cut_off_answers="keep_score",  # a game that is not won in time keeps what its guesses earned
    )
    engine = RLHFEngine(
        actor_model=options.actor, total_steps=options.steps, config=config, environment=GuessTheNumber
    )
    train(engine, options.steps)


if __name__ == "__main__":
    main()
