"""Sample answers in advance, in a thread beside the server that shows them.

Responsible for: making batches of new tasks while few are left.
Not responsible for: models (answerer.py), prompts (prompts.py), the database (data/labels/).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Protocol

from dovetail.data.labels.database import Store
from dovetail.data.labels.tasks import NewTask, Sampled, add_tasks, num_ready, prompt_key, used_prompts
from dovetail.engine.sampling import Sampling
from dovetail.errors import DovetailError
from dovetail.rlhf.rewards import Answer, Scorer
from dovetail.serving.labelling.router import SupplyState
from dovetail.telemetry.log import say, warn
from dovetail.text.content_hash import content_hash
from dovetail.text.message import Message

_LOOK_EVERY_SECONDS = 1.0
_RECORDED = ("temperature", "top_p", "top_k", "max_new_tokens")

Prompt = Sequence[Message]


class Answerer(Protocol):
    """A model that answers prompts; see ModelAnswerer."""

    @property
    def name(self) -> str:
        """The name of the model in the database."""
        ...

    def answers(
        self,
        prompts: Sequence[Prompt],
        seeds: Sequence[int],
        sampling: Sampling,
        is_cancelled: Callable[[], bool],
    ) -> list[Answer | None]:
        """Answer each prompt, with None where it does not fit."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The settings for sampling answers."""

    sampling: Sampling
    answers_per_prompt: int = 2
    """The number of answers to each prompt; several models take turns."""
    batch_size: int = 16
    """The number of prompts that are answered together."""
    ahead: int = 64
    """The number of tasks that each annotator should still find; with fewer, a batch is made."""
    seed: int = 0


@dataclass(slots=True)
class Supply:
    """A maker of tasks from prompts, which runs in a thread of its own."""

    store: Store
    project_id: int
    prompts: Sequence[Prompt]
    models: Sequence[Answerer]
    plan: Plan
    scorer: Scorer | None = None
    """The reward model whose scores order the tasks: those with the smallest margin come first."""
    _problem: str | None = None
    _is_done: bool = False
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def state(self) -> SupplyState:
        """Return the state for the pages. Any thread may call this."""
        return SupplyState(is_sampling=not self._is_done, problem=self._problem)

    def start(self) -> None:
        """Start the thread."""
        self._thread = threading.Thread(target=self._run, name="supply", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread, also in the middle of a batch, and wait until it has ended."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Make tasks in a thread until the block ends."""
        self.start()
        try:
            yield
        finally:
            self.stop()

    def _run(self) -> None:
        try:
            self.work()
        except DovetailError as error:
            self._problem = error.message
            warn(f"no more answers are sampled: {error.message}", hint=error.hint)
        except Exception as error:  # only the thread can report what ended it; labelling goes on
            self._problem = f"{type(error).__name__}: {error}"
            warn(f"no more answers are sampled: {self._problem}")
        finally:
            self._is_done = True

    def work(self) -> None:
        """Make tasks of all prompts that have none in this project, never far ahead of the annotators."""
        used = used_prompts(self.store, self.project_id)
        waiting = [prompt for prompt in self.prompts if prompt_key(prompt) not in used]
        made = asked = 0
        while asked < len(waiting) and not self._stop.is_set():
            if num_ready(self.store, self.project_id) >= self.plan.ahead:
                self._stop.wait(_LOOK_EVERY_SECONDS)
                continue
            batch = waiting[asked : asked + self.plan.batch_size]
            tasks = self.tasks_of(batch)
            if self._stop.is_set():
                return
            made += add_tasks(self.store, self.project_id, tasks)
            asked += len(batch)
        left_out = f"; {asked - made} left out, too long or with equal answers" if asked > made else ""
        say(f"sampled {made} tasks from {asked} prompts{left_out}")

    def tasks_of(self, prompts: Sequence[Prompt]) -> list[NewTask]:
        """Sample and score tasks; prompts that do not fit a model are left out."""
        count = self.plan.answers_per_prompt
        columns = [self._sample(prompts, position) for position in range(count)]
        rows = [[one for one in row if one is not None] for row in zip(*columns, strict=True)]
        whole = [(prompt, row) for prompt, row in zip(prompts, rows, strict=True) if len(row) == count]
        scores = self._scores([answer for _, row in whole for answer, _ in row])
        tasks = []
        for index, (prompt, row) in enumerate(whole):
            own = scores[index * count : (index + 1) * count] if scores else [None] * count
            answers = [replace(sampled, score=score) for (_, sampled), score in zip(row, own, strict=True)]
            tasks.append(NewTask(messages=prompt, answers=answers))
        return tasks

    def _sample(self, prompts: Sequence[Prompt], position: int) -> list[tuple[Answer, Sampled] | None]:
        """Sample the answers at one position of every prompt."""
        model = self.models[position % len(self.models)]
        seeds = [answer_seed(self.plan.seed, prompt, position) for prompt in prompts]
        answers = model.answers(prompts, seeds, self.plan.sampling, self._stop.is_set)
        settings = {name: asdict(self.plan.sampling)[name] for name in _RECORDED}
        return [
            None
            if answer is None
            else (answer, Sampled(text=answer.text, model=model.name, seed=seed, sampling=settings))
            for answer, seed in zip(answers, seeds, strict=True)
        ]

    def _scores(self, answers: Sequence[Answer]) -> list[float]:
        if self.scorer is None or not answers or self._stop.is_set():
            return []
        return [float(score) for score in self.scorer(answers).scores_S]


def answer_seed(seed: int, prompt: Prompt, position: int) -> int:
    """Return the seed of one answer, so that the answer to a prompt does not depend on the rest of its batch."""
    return int(content_hash(seed, prompt_key(prompt), position)[:15], 16)
