"""A calculator as a tool: the model asks it for what it cannot work out itself, and answers with the result.

    python examples/calculator.py ACTOR_FOLDER --steps 50
    dovetail ppo my_recipe.yaml ppo.environment=examples/calculator.py:TOOLS ppo.reward_function=number

A list of functions is the simplest environment: their signatures and docstrings are described to the model in the form
of its chat template, each call is answered with the result or the error, and a turn without a call is the answer.
"""

import argparse
import ast
import operator
import random
from collections.abc import Callable

from dovetail import PPOTrainer, Prompt, RLHFEngine
from dovetail.config.policy import PolicyConfig
from dovetail.config.stages import PpoConfig, SamplingConfig
from dovetail.rlhf.algorithms.named import algorithm_named
from dovetail.rlhf.verifiers.builtin import number

OPERATORS: dict[type[ast.AST], Callable[..., float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.USub: operator.neg,
}


def calculate(expression: str) -> str:
    """Calculate the value of an arithmetic expression.

    Args:
        expression: Numbers with + - * / and brackets, such as "(12 + 7) * 3".
    """
    return f"{value_of(ast.parse(expression, mode='eval').body):.12g}"


def value_of(node: ast.AST) -> float:
    """Return the value of a parsed expression. What it raises is what the model reads."""
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return node.value
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](value_of(node.left), value_of(node.right))
    if isinstance(node, ast.UnaryOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](value_of(node.operand))
    raise ValueError("only numbers with + - * / and brackets can be calculated")


TOOLS = [calculate]


def is_right(completion: str, answer: str) -> float:
    """Score an episode by the number in its last turn."""
    return number(completion, answer)


def prompts(count: int, seed: int) -> list[Prompt]:
    """Return sums that are hard to work out in one's head, each with its answer in the row."""
    draw = random.Random(seed)
    made = []
    for _ in range(count):
        a, b, c = (draw.randint(100, 999) for _ in range(3))
        question = f"What is {a} * {b} - {c}? You may use the calculator."
        made.append(Prompt(messages=({"role": "user", "content": question},), row={"answer": str(a * b - c)}))
    return made


def make_engine(actor: str, steps: int, config: PpoConfig) -> RLHFEngine:
    """Return an engine that trains by GRPO, with four episodes for each question."""
    return RLHFEngine(
        actor_model=actor,
        total_steps=steps,
        config=config,
        reward=is_right,
        environment=TOOLS,
        algorithm=algorithm_named("grpo", PolicyConfig(answers_per_prompt=4), config),
    )


def train(engine: RLHFEngine, steps: int) -> list[float]:
    """Take steps; returns the calls per episode before each."""
    trainer = PPOTrainer(engine)
    calls = []
    for step in range(steps):
        collected = trainer.generate_experience(prompts(engine.config.batch_size // 4, seed=step))
        trainer.train_rlhf(collected)
        calls.append(collected.stats["environment/calls_mean"])
        print(f"step {step}: score {collected.stats['ppo/score_mean']:.3f}, {calls[-1]:.2f} calls an episode")
    return calls


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("actor", help="a folder or hub name of a chat model")
    parser.add_argument("--steps", type=int, default=50)
    options = parser.parse_args()
    config = PpoConfig(sampling=SamplingConfig(max_new_tokens=384))
    train(make_engine(options.actor, options.steps, config), options.steps)


if __name__ == "__main__":
    main()
