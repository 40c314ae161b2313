"""Generate all rows that the demo trains on and is measured with.

Responsible for: which tasks each stage sees, how often, and the held-out prompts, the same for every seed.
Not responsible for: tokens (tokenizer.py), or pairs of a model's own answers, which need the model first.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dovetail.demo.answers import MIXED, PLAIN, Habits, write_answer
from dovetail.demo.lookup import tasks_by_turns
from dovetail.demo.tasks import Task
from dovetail.demo.words import NAMES, PREFIXES
from dovetail.text.message import Message, message

HELD_OUT_SEED = 20_220_304
"""The seed of the held-out prompts and documents. It is never the run's own, so all runs are measured alike."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """The number of rows of each kind."""

    documents: int = 6_000
    demonstrations: int = 16_000
    reward_prompts: int = 2_400
    ppo_prompts: int = 3_200
    test_prompts: int = 200
    dev_prompts: int = 200
    held_out_documents: int = 200


@dataclass(frozen=True, slots=True)
class TaskPrompt:
    """A prompt and the task that it asks."""

    task: Task
    prefix: str = ""

    @property
    def messages(self) -> list[Message]:
        """The prompt as chat messages."""
        return self.task.messages(self.prefix)


@dataclass(frozen=True, slots=True)
class Exchange:
    """A prompt with a written answer."""

    prompt: TaskPrompt
    answer: str

    @property
    def messages(self) -> list[Message]:
        """The whole conversation."""
        return [*self.prompt.messages, message("assistant", self.answer)]


@dataclass(frozen=True, slots=True)
class Dataset:
    """The rows of one run."""

    documents: tuple[str, ...]
    """Plain text, for the base model and for mixture training."""
    demonstrations: tuple[Exchange, ...]
    """The rows for supervised fine-tuning."""
    reward_prompts: tuple[TaskPrompt, ...]
    """The prompts whose sampled answers make pairs."""
    ppo_prompts: tuple[TaskPrompt, ...]
    """The prompts for PPO."""
    test: tuple[TaskPrompt, ...]
    """Held-out prompts for the figures that are reported."""
    dev: tuple[TaskPrompt, ...]
    """Held-out prompts for choices, such as the best checkpoint."""
    held_out_documents: tuple[str, ...]
    """Plain text that is never trained on."""

    def write(self, folder: Path) -> dict[str, Path]:
        """Write each kind of row as a JSON-lines file with columns `messages`, `prompt` or `text`."""
        kinds: dict[str, Iterable[dict[str, Any]]] = {
            "documents": ({"text": text} for text in self.documents),
            "held_out_documents": ({"text": text} for text in self.held_out_documents),
            "demonstrations": ({"messages": row.messages} for row in self.demonstrations),
            "reward_prompts": ({"prompt": row.messages} for row in self.reward_prompts),
            "ppo_prompts": ({"prompt": row.messages} for row in self.ppo_prompts),
            "test": ({"prompt": row.messages} for row in self.test),
            "dev": ({"prompt": row.messages} for row in self.dev),
        }
        folder.mkdir(parents=True, exist_ok=True)
        paths = {kind: folder / f"{kind}.jsonl" for kind in kinds}
        for kind, rows in kinds.items():
            paths[kind].write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return paths


def dataset(seed: int, sizes: Sizes | None = None, *, habits: Habits = MIXED) -> Dataset:
    """Generate the rows of the run with this seed; the held-out ones do not depend on it."""
    sizes = sizes or Sizes()
    tasks = list(tasks_by_turns().values())
    trainable = _by_family([task for task in tasks if task.is_trainable])
    held_out = _by_family([task for task in tasks if task.is_held_out])
    # One stream of random numbers per kind of row: changing one size leaves the other rows as they are.
    rngs = {kind: random.Random(f"{kind} {seed}") for kind in ("documents", "sft", "reward", "ppo")}
    demonstrations = [
        Exchange(prompt, write_answer(prompt.task, rngs["sft"], habits))
        for prompt in _prompts(trainable, sizes.demonstrations, rngs["sft"])
    ]
    documents = _documents(trainable, sizes.documents, rngs["documents"])
    fixed = random.Random(HELD_OUT_SEED)
    questions = _distinct_prompts(held_out, sizes.test_prompts + sizes.dev_prompts, fixed)
    seen = set(documents)
    unseen = _documents(trainable, 2 * sizes.held_out_documents, fixed)
    return Dataset(
        documents=tuple(documents),
        demonstrations=tuple(demonstrations),
        reward_prompts=tuple(_prompts(trainable, sizes.reward_prompts, rngs["reward"])),
        ppo_prompts=tuple(_prompts(trainable, sizes.ppo_prompts, rngs["ppo"])),
        test=tuple(questions[: sizes.test_prompts]),
        dev=tuple(questions[sizes.test_prompts :]),
        held_out_documents=tuple([text for text in unseen if text not in seen][: sizes.held_out_documents]),
    )


def _by_family(tasks: Iterable[Task]) -> dict[str, list[Task]]:
    families: dict[str, list[Task]] = {}
    for task in tasks:
        families.setdefault(task.family, []).append(task)
    return families


def _draw(families: Mapping[str, Sequence[Task]], count: int, rng: random.Random) -> list[Task]:
    """Draw tasks with replacement, families by the fourth root of their size, so that small ones occur too."""
    names = list(families)
    weights = [len(families[name]) ** 0.25 for name in names]
    return [rng.choice(families[name]) for name in rng.choices(names, weights, k=count)]


def _prompts(families: Mapping[str, Sequence[Task]], count: int, rng: random.Random) -> list[TaskPrompt]:
    return [TaskPrompt(task, _prefix(task, rng)) for task in _draw(families, count, rng)]


def _prefix(task: Task, rng: random.Random) -> str:
    return rng.choice(PREFIXES) if task.may_take_prefix and rng.random() < 0.4 else ""


def _distinct_prompts(
    families: Mapping[str, Sequence[Task]], count: int, rng: random.Random
) -> list[TaskPrompt]:
    chosen: dict[TaskPrompt, None] = {}
    while len(chosen) < count:
        chosen.update(dict.fromkeys(_prompts(families, count, rng)))
    return list(chosen)[:count]


def _documents(families: Mapping[str, Sequence[Task]], count: int, rng: random.Random) -> list[str]:
    """Generate plain text of two kinds, without any chat format.

    The dialogues are plain and correct: the model learns facts from text, and manner from demonstrations.
    """
    factual = {name: [task for task in tasks if task.fact] for name, tasks in families.items()}
    factual = {name: tasks for name, tasks in factual.items() if tasks}
    return [_facts(factual, rng) if rng.random() < 0.1 else _script(families, rng) for _ in range(count)]


def _facts(families: Mapping[str, Sequence[Task]], rng: random.Random) -> str:
    """Generate a text of facts that are always true."""
    return " ".join(task.fact or "" for task in _draw(families, 8, rng))


def _script(families: Mapping[str, Sequence[Task]], rng: random.Random) -> str:
    """Generate a dialogue of two people."""
    speakers = rng.sample(NAMES, 2)
    lines = []
    for prompt in _prompts(families, 3, rng):
        turns = [*(turn["content"] for turn in prompt.messages), write_answer(prompt.task, rng, PLAIN)]
        lines += [f"{speakers[i % 2]}: {turn}" for i, turn in enumerate(turns)]
    return "\n".join(lines)
