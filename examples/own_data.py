"""Rows of your own: comparisons of two answers, from which all three stages learn.

    python examples/own_data.py my_pairs.jsonl
    dovetail train examples/own_data.yaml

Each row is a prompt with the answer that people should get (`chosen`) and one that they should not (`rejected`).
Stage 1 imitates the chosen answers, stage 2 learns the comparison, stage 3 takes the prompts. docs/first-run.md walks
through it.
"""

import json
import sys
from pathlib import Path

NAMES = [
    *("Rosa", "Nina", "Sam", "Emma", "Leo", "Ada", "Tom", "Mia", "Ben", "Eva", "Max", "Ida"),
    *("Jon", "Zoe", "Kim", "Lea", "Ron", "Amy", "Dan", "Ivy", "Guy", "Una", "Rex", "Fay"),
]
PROMPTS = [
    "My name is {}.",
    "I am {}.",
    "They call me {}.",
    "Hello, I am {}.",
    "Say hello to {}.",
    "Greet {}.",
    "Hi! I am {}.",
    "This is {}.",
    "You can call me {}.",
    "Please greet {}.",
]


def rows() -> list[dict[str, str]]:
    """240 comparisons: an offer of help is wanted, a plain greeting is not."""
    return [
        {
            "prompt": prompt.format(name),
            "chosen": f"Happy to help you, {name}!",
            "rejected": f"Nice to meet you, {name}.",
        }
        for prompt in PROMPTS
        for name in NAMES
    ]


if __name__ == "__main__":
    lines = [json.dumps(row) + "\n" for row in rows()]
    Path(sys.argv[1]).write_text("".join(lines), encoding="utf-8")
