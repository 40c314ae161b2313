"""Train a chat model on arithmetic word problems with a verifier, and count right answers before and after.

    python benchmarks/arithmetic.py SmolLM2.gguf --algorithm grpo --rollouts 60 --output runs/arithmetic
    python benchmarks/arithmetic.py SmolLM2.gguf --algorithm ppo --rollouts 60 --output runs/arithmetic-ppo

The settings are those of the recipe smollm2-135m; nothing but the model, the data, the reward and the length of an
answer is set here. Held-out problems have numbers that no training problem has. One JSON line.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

from dovetail import ChatModel, Sampling
from dovetail.config.load import load
from dovetail.rlhf.verifiers.builtin import number
from dovetail.stages import pipeline

NAMES = ("Ann", "Ben", "Cara", "Dan", "Eve", "Finn", "Gus", "Hana")
THINGS = ("apples", "books", "coins", "stamps", "marbles", "pens", "shells", "cards")
STORIES = (
    ("{name} has {a} {thing} and gets {b} more. How many {thing} does {name} have now?", lambda a, b: a + b),
    ("{name} had {a} {thing} and gave {b} away. How many {thing} are left?", lambda a, b: a - b),
    ("{name} has {b} boxes with {a} {thing} in each. How many {thing} are there in all?", lambda a, b: a * b),
)


def problems(count: int, *, held_out: bool, seed: int) -> list[dict[str, str]]:
    """Draw problems; every seventh pair of numbers is held out."""
    rng, rows = random.Random(seed), []
    while len(rows) < count:
        a, b = rng.randrange(10, 50), rng.randrange(2, 10)
        if ((a * 10 + b) % 7 == 0) != held_out:
            continue
        text, answer = rng.choice(STORIES)
        question = text.format(name=rng.choice(NAMES), thing=rng.choice(THINGS), a=a, b=b)
        rows.append({"prompt": f"{question} Answer with a number.", "answer": str(answer(a, b))})
    return rows


def accuracy(model: str, rows: list[dict[str, str]], max_new_tokens: int) -> float:
    """Return the share of problems that greedy answers get right."""
    answers = ChatModel(model).chat_many(
        [row["prompt"] for row in rows], sampling=Sampling(max_new_tokens=max_new_tokens, temperature=0.0)
    )
    right = [number(text, row["answer"]) for text, row in zip(answers, rows, strict=True)]
    return sum(right) / len(right)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--algorithm", default="grpo")
    parser.add_argument("--rollouts", type=int, default=60)
    parser.add_argument("--held-out", type=int, default=1000)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="runs/arithmetic")
    parser.add_argument(
        "settings", nargs="*", help="settings other than the recipe's, such as ppo.batch_size=256"
    )
    options = parser.parse_intermixed_args()
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "problems.jsonl"
    data.write_text(
        "".join(json.dumps(row) + "\n" for row in problems(20_000, held_out=False, seed=options.seed))
    )
    tests = problems(options.held_out, held_out=True, seed=options.seed + 1)
    config = load(
        "smollm2-135m",
        [
            f"actor.path={options.model}", "reward_model=null", "stages=[ppo]", f"algorithm={options.algorithm}",
            f"data.blend=[{{path: {data}}}]", "data.stage_split=null", "ppo.reward_function=number",
            f"ppo.sampling.max_new_tokens={options.max_new_tokens}", f"ppo.max_steps={options.rollouts}",
            f"seed={options.seed}", f"output_dir={folder / options.algorithm}", *options.settings,
        ],
    )  # fmt: skip
    before = accuracy(options.model, tests, options.max_new_tokens)
    start = time.monotonic()
    pipeline.run(config)
    seconds = time.monotonic() - start
    after = accuracy(str(folder / options.algorithm / "ppo/model"), tests, options.max_new_tokens)
    found: dict[str, Any] = {
        "benchmark": "arithmetic", "algorithm": options.algorithm, "rollouts": options.rollouts, "seed": options.seed,
        "settings": options.settings, "accuracy_before": before, "accuracy_after": after,
        "train_seconds": round(seconds),
    }  # fmt: skip
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
