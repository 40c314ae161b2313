"""Compare finished models on tasks: the work behind `dovetail eval`.

Responsible for: the models and reward models that paths name, one after the other in memory; a run's own held-out rows
as tasks; the results. Not responsible for: the tasks (rlhf/tasks/), the table (cli/evaluate.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dovetail.config.load import load
from dovetail.config.run import ROWS_OF, RunConfig
from dovetail.data.blend import StageRows, load_stage
from dovetail.data.records import Prompt, as_prompt
from dovetail.data.tokenize import fitting_prompts
from dovetail.errors import ConfigError
from dovetail.model.load import is_reward_model, load_scalar_model
from dovetail.model.placement import resolve_device, resolve_dtype
from dovetail.rlhf.judge import Referee
from dovetail.rlhf.tasks.answered import Answered, answer_prompts, verdicts, wins
from dovetail.rlhf.tasks.named import TaskName, load_pairs, load_task, rows_of_source
from dovetail.rlhf.tasks.pairs import Pairs, RewardModel
from dovetail.rlhf.tasks.subject import Drawing, Subject, Task
from dovetail.rlhf.tasks.texts import Texts
from dovetail.runs.run_models import chat_models, reward_folder
from dovetail.serving.inference.loading import load_chat
from dovetail.telemetry.log import say, warn
from dovetail.text.chat_format import ChatFormat
from dovetail.text.tokenizer import load_tokenizer
from dovetail.training.step import TokenBudget

_FORWARD_TOKENS = 8192
Figures = dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Contestants:
    """The models of a comparison by name, each with its place."""

    chat: Mapping[str, str]
    """Models that answer; the first is what the others are compared with."""
    rewards: Mapping[str, str]
    """Reward models, which score the answers."""
    run: RunConfig | None
    """The settings of the first run among them."""


@dataclass(frozen=True, slots=True)
class Result:
    """The figures of one task, by model."""

    task: str
    num_rows: int
    figures: dict[str, Figures] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Tasks:
    """The tasks of a comparison by what they ask of a model."""

    prompts: list[tuple[str, list[Prompt]]] = field(default_factory=list)
    language: list[Task] = field(default_factory=list)
    pairs: list[Pairs] = field(default_factory=list)


def contestants(paths: Sequence[str]) -> Contestants:
    """Return the models that paths name. A run folder stands for all its finished models.

    Raises ModelError for a path that is neither a model nor a run with a finished one.
    """
    chat: dict[str, str] = {}
    rewards: dict[str, str] = {}
    run: RunConfig | None = None
    for path in paths:
        folder = Path(path).expanduser()
        recipe = folder / "config.yaml"
        if not recipe.is_file():
            (rewards if is_reward_model(path) else chat)[path] = path
            continue
        run = run or load(str(recipe))
        before = f"{folder.name}/" if len(paths) > 1 else ""
        chat |= {f"{before}{name}": place for name, place in reversed(chat_models(path).items())}
        if (place := reward_folder(path)) != path:
            rewards[f"{before}reward"] = place
    if len(rewards) == 1:
        rewards = {"reward": next(iter(rewards.values()))}
    return Contestants(chat=chat, rewards=rewards, run=run)


def compare(
    models: Contestants,
    tasks: Sequence[TaskName],
    drawing: Drawing,
    *,
    limit: int,
    judge: Referee | None = None,
    device: str = "auto",
) -> list[Result]:
    """Return the figures of all models on all tasks; without tasks, on what the first run holds out.

    Two language models are in memory at once, the first and the one that is measured, and all reward models.
    limit: the most rows of a task.
    """
    where = resolve_device(device)
    found = _Found(_tasks(tasks, models, drawing, limit), judge)
    reward_models = {name: _reward_model(place, where) for name, place in models.rewards.items()}
    first: Subject | None = None
    for name, place in models.chat.items():
        say(f"{name}: {place}")
        subject = _subject(place, device)
        first = first or subject
        found.measure(name, subject, first, reward_models, drawing)
    for name, reward_model in reward_models.items():
        found.measure_reward_model(name, reward_model)
    return found.results()


class _Found:
    """The results so far, with the answers of the first model, which those of the others are compared with."""

    def __init__(self, tasks: _Tasks, judge: Referee | None) -> None:
        self._tasks = tasks
        self._judge = None if judge is None else partial(verdicts, judge)
        self._first: list[Answered] = []
        self._of_prompts = [Result(label, len(rows)) for label, rows in tasks.prompts]
        self._of_language = [Result(task.label, len(task)) for task in tasks.language]
        self._of_pairs = [Result(task.label, len(task)) for task in tasks.pairs]

    def measure(
        self,
        name: str,
        subject: Subject,
        first: Subject,
        reward_models: Mapping[str, RewardModel],
        drawing: Drawing,
    ) -> None:
        """Add the figures of a language model."""
        is_first = subject is first
        has_same_tokens = first.chat.tokenizer.get_vocab() == subject.chat.tokenizer.get_vocab()
        if not has_same_tokens and self._tasks.prompts:
            warn(f"{name} has another vocabulary than the first model, so there is no KL between them")
        for index, (result, (_, prompts)) in enumerate(
            zip(self._of_prompts, self._tasks.prompts, strict=True)
        ):
            answered = answer_prompts(
                prompts,
                subject,
                drawing,
                reward_models=reward_models,
                reference=first if has_same_tokens and not is_first else None,
            )
            if is_first:
                self._first.append(answered)
            compared = {} if is_first else wins(answered, self._first[index], self._judge)
            result.figures[name] = compared | dict(answered.figures)
        for result, task in zip(self._of_language, self._tasks.language, strict=True):
            result.figures[name] = task(subject)

    def measure_reward_model(self, name: str, reward_model: RewardModel) -> None:
        """Add the figures of a reward model."""
        for result, task in zip(self._of_pairs, self._tasks.pairs, strict=True):
            result.figures[name] = task(reward_model)

    def results(self) -> list[Result]:
        """Return the results of all tasks that some model was measured on."""
        return [
            result for result in (*self._of_prompts, *self._of_language, *self._of_pairs) if result.figures
        ]


def _subject(place: str, device: str) -> Subject:
    loaded = load_chat(place, device=device)
    return Subject(
        model=loaded.model,
        chat=loaded.chat,
        engine=loaded.engine(),
        device=loaded.device,
        budget=TokenBudget(_FORWARD_TOKENS),
    )


def _reward_model(place: str, device: torch.device) -> RewardModel:
    model = load_scalar_model(
        place, dtype=resolve_dtype("auto", device), device=device, seed=0, pad_token_id=None
    )
    chat = ChatFormat(load_tokenizer(place))
    return RewardModel(model=model, chat=chat, device=device, budget=TokenBudget(_FORWARD_TOKENS))


def _tasks(names: Sequence[TaskName], models: Contestants, drawing: Drawing, limit: int) -> _Tasks:
    """Load the tasks; without names, the rows that the run holds out."""
    if not names and models.run is not None:
        return _held_out(models.run, models, limit)
    if not names:
        raise ConfigError(
            "there is nothing to compare on: no --task is given, and no path is a run with rows of its own",
            hint="add --task prompts.jsonl, or give a run folder",
        )
    tasks = _Tasks()
    for name in names:
        if name.kind == "prompts":
            tasks.prompts.append((str(name), rows_of_source(name.source, "ppo", limit)))
        elif name.kind == "pairs":
            tasks.pairs.append(load_pairs(name, limit=limit))
        else:
            tasks.language.append(load_task(name, drawing, limit=limit))
    return tasks


def _held_out(run: RunConfig, models: Contestants, limit: int) -> _Tasks:
    """Return what a run holds out, as its stages see it: prompts, plain text and comparisons.

    The prompts are those of the rows that the last stage reads, as far as they fit by the tokens of the first model.
    """
    data = run.data_of_stages().model_copy(update={"max_eval_rows": limit})
    tasks = _Tasks()
    for first in list(models.chat.values())[:1]:
        rows: StageRows[Any] = load_stage(data, ROWS_OF[run.stages[-1]], "held_out")
        if len(rows):
            prompts = replace(rows, records=[as_prompt(row) for row in rows.records])
            chat = ChatFormat(load_tokenizer(first))
            tasks.prompts.append(("held-out prompts", list(fitting_prompts(prompts, chat, data))))
        if data.pretraining and (texts := load_stage(data, "text", "held_out")):
            tasks.language.append(Texts("held-out text", [row.text for row in texts]))
    if models.rewards and (comparisons := load_stage(data, "reward", "held_out")):
        tasks.pairs.append(Pairs("held-out comparisons", list(comparisons)))
    return tasks
