"""A language model as tasks see it: it answers prompts, and gives tokens their probability.

Responsible for: drawing answers through the engine, with the texts that end them. Not responsible for: loading models,
what answers are worth (the tasks beside this file).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from dovetail.batches import PackedBatch
from dovetail.data.records import Prompt
from dovetail.engine.hybrid import HybridEngine
from dovetail.engine.sampling import Sampling
from dovetail.model.forward import LogProbs
from dovetail.parallel.shard import sharding_of
from dovetail.rlhf.api import RLHFEngine
from dovetail.rlhf.evaluation import EVALUATION_SEED
from dovetail.rlhf.rewards import Answer
from dovetail.rlhf.roles import policy_logprobs
from dovetail.rlhf.rollout import complete
from dovetail.text.chat_format import ChatFormat
from dovetail.training.step import TokenBudget


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """The way answers are drawn in an evaluation."""

    max_new_tokens: int
    temperature: float = 1.0
    samples: int = 1
    """Answers to each prompt of a task with right and wrong answers."""
    seed: int = EVALUATION_SEED


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A language model with what reads and writes its tokens."""

    model: Any
    chat: ChatFormat
    engine: HybridEngine
    device: torch.device
    budget: TokenBudget
    """Tokens of one forward pass."""

    @classmethod
    def of_engine(cls, engine: RLHFEngine) -> "Subject":
        """Return the actor of an engine as it is now."""
        roles = engine.roles
        return cls(
            model=roles.actor, chat=roles.chat, engine=roles.engine, device=roles.device, budget=roles.budget
        )

    def answers(self, prompts: Sequence[Prompt], drawing: Drawing, *, greedy: bool = False) -> list[Answer]:
        """Return one answer to each prompt; the same seed draws the same answers from the same weights."""
        how = Sampling(
            max_new_tokens=drawing.max_new_tokens,
            temperature=0.0 if greedy else drawing.temperature,
            stop_token_ids=self.chat.stop_token_ids,
            stop_strings=self.chat.stop_strings,
        )
        messages = [prompt.messages for prompt in prompts]
        prompt_ids = self.chat.encode_prompts(messages)
        world = sharding_of(self.model).world.everyone
        answers = complete(prompt_ids, messages, self.engine, self.chat, how, seed=drawing.seed, world=world)
        return [
            replace(answer, text=self._before_stop(answer.text), row=prompt.row)
            for answer, prompt in zip(answers, prompts, strict=True)
        ]

    def logprobs(self, batch: PackedBatch, *, temperature: float) -> LogProbs:
        """Return log-probabilities and entropies of the marked tokens of a batch on the device."""
        return policy_logprobs(self.model, batch, self.budget, temperature=temperature)

    def _before_stop(self, text: str) -> str:
        """Return the text without the beginning of a next question, which ends an answer and is no part of it."""
        for stop in self.chat.stop_strings:
            text = text.split(stop)[0]
        return text


def judge_by_tasks(tasks: Mapping[str, "Task"], engine: RLHFEngine) -> dict[str, float]:
    """Return the figures of the actor on all tasks, each after the name of its task."""
    subject = Subject.of_engine(engine)
    with engine.learners.offloaded():
        return {
            f"ppo/{name}_{figure}": value
            for name, task in tasks.items()
            for figure, value in task(subject).items()
        }


class Task(Protocol):
    """A task for language models."""

    @property
    def label(self) -> str:
        """The name in tables, as it was asked for."""
        ...

    def __len__(self) -> int:
        """Return the number of rows."""
        ...

    def __call__(self, subject: Subject) -> dict[str, float]:
        """Return the figures of a model by name; those of a share or a mean go with `NAME_stderr`, or `NAME_low` and
        `NAME_high`."""
        ...
