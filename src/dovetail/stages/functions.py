"""The stages as functions: rows and rewards as Python has them, a trained model back.

    from dovetail import train_ppo, train_reward, train_sft

    sft = train_sft("facebook/opt-125m", demonstrations, output_dir="runs/sft")
    reward = train_reward("facebook/opt-125m", comparisons, output_dir="runs/reward")
    actor = train_ppo(sft, prompts, reward=reward, output_dir="runs/ppo", settings={"ppo.batch_size": 32})
    actor.model.generate(...)

Responsible for: turning Python values into the sources and names that a configuration holds, so that such a run is
like any other: it resumes, refuses another run's folder, and has a page. Not responsible for: the stages (pipeline.py),
the forms of rows and of reward functions (data/, rlhf/reward_functions.py).
"""

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

import datasets
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from dovetail.config.load import load
from dovetail.config.recipes import recipe_for
from dovetail.config.run import StageName
from dovetail.errors import ConfigError, DataError
from dovetail.runs.disk import write_atomically
from dovetail.runs.run_folder import RunFolder
from dovetail.stages import pipeline
from dovetail.text.content_hash import content_hash

Rows: TypeAlias = Sequence[Mapping[str, Any]] | datasets.Dataset
"""Rows in Python: dictionaries, or a Dataset."""
Source: TypeAlias = str | Path | Mapping[str, Any] | Rows
"""A file or name, rows, or the settings of a source (docs/data.md), whose `path` may be rows."""
Reward: TypeAlias = str | Callable[..., Any]
"""A reward function in any of its forms (docs/rewards.md), or the name of a built-in verifier."""

_FUNCTIONS = "dovetail_functions"
"""The module that holds functions which no other module names, such as those made within functions."""


@dataclass(frozen=True)
class Trained:
    """A finished stage of a run: where its model lies, its results, and the model itself."""

    run: Path
    """The folder of the run."""
    stage: StageName

    @property
    def path(self) -> Path:
        """The model's folder, which any Hugging Face program loads."""
        return RunFolder(self.run).model(self.stage)

    @property
    def results(self) -> dict[str, float]:
        """The results of the stage on held-out rows."""
        found: dict[str, float] = RunFolder(self.run).read_summary().get(self.stage, {})
        return found

    @cached_property
    def model(self) -> PreTrainedModel:
        """The model, loaded by transformers on first use; a reward model has one label, the score."""
        kind = AutoModelForSequenceClassification if self.stage == "reward" else AutoModelForCausalLM
        model: PreTrainedModel = kind.from_pretrained(self.path)
        return model

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, with the chat template of the run."""
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(self.path)
        return tokenizer

    def save_pretrained(self, folder: str | Path) -> None:
        """Save model and tokenizer to another folder."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


Model: TypeAlias = str | Path | Trained
"""A hub name, a folder, a .gguf file, or what a stage has returned."""


def train_sft(
    model: Model,
    data: Source | Sequence[Source],
    *,
    output_dir: str | Path,
    settings: Mapping[str, Any] | None = None,
) -> Trained:
    """Fine-tune a causal language model on demonstrations: stage 1.

    data: demonstrations. settings: by dotted name, such as {"sft.epochs": 2}; the others are those of the recipe
    nearest to the model. The same call again resumes a run that was interrupted, and returns a finished one at once.
    Raises DataError, ModelError or ConfigError naming what is wrong with a row, a model or a setting.
    """
    return _trained("sft", model, data, output_dir, settings, {})


def train_reward(
    model: Model,
    data: Source | Sequence[Source],
    *,
    output_dir: str | Path,
    settings: Mapping[str, Any] | None = None,
) -> Trained:
    """Train a reward model on comparisons: stage 2.

    model: the causal language model that it starts from, or a reward model. data: comparisons. Else as `train_sft`.
    """
    return _trained("reward", model, data, output_dir, settings, {"reward_model.path": _path(model)})


def train_dpo(
    model: Model,
    data: Source | Sequence[Source],
    *,
    output_dir: str | Path,
    settings: Mapping[str, Any] | None = None,
) -> Trained:
    """Let a model learn from comparisons directly: direct preference optimisation.

    model: a fine-tuned one. data: comparisons. settings: such as {"dpo.loss": "ipo"}. Else as `train_sft`.
    """
    return _trained("dpo", model, data, output_dir, settings, {"algorithm": "dpo"})


def train_ppo(
    model: Model,
    data: Source | Sequence[Source],
    *,
    reward: Trained | Reward | Sequence[Reward] | Mapping[Reward, float],
    algorithm: str = "ppo",
    output_dir: str | Path,
    settings: Mapping[str, Any] | None = None,
) -> Trained:
    """Let a model learn from rewards for its own answers: stage 3, by PPO or another algorithm.

    model: a fine-tuned one. data: prompts. reward: a finished reward model, or functions, several with weights as a
    mapping from function to weight. algorithm: also grpo, rloo and the others of docs/algorithms.md. Else as
    `train_sft`.
    """
    given: dict[str, Any] = {"algorithm": algorithm}
    if isinstance(reward, Trained):
        given |= {"reward_model.path": str(reward.path)}
    else:
        given |= {"reward_model": None, "ppo.reward_function": _reward_terms(reward)}
    return _trained("ppo", model, data, output_dir, settings, given)


def _trained(
    stage: StageName,
    model: Model,
    data: Source | Sequence[Source],
    output_dir: str | Path,
    settings: Mapping[str, Any] | None,
    given: Mapping[str, Any],
) -> Trained:
    """Run one stage in this process."""
    settings = dict(settings or {})
    if settings.get("num_gpus", 1) != 1:
        raise ConfigError(
            f"num_gpus = {settings['num_gpus']}: a function trains in this process alone",
            hint="start the script with torchrun, which makes one process a GPU, or use `dovetail train`",
        )
    folder = Path(output_dir).expanduser()
    values = {
        "actor.path": _path(model),
        "output_dir": str(folder),
        "data.blend": [_source(source, folder) for source in _sources(data)],
        "data.stage_split": None,
        "stages": [stage],
        **given,
        **settings,
    }
    config = load(
        recipe_for(_path(model)).recipe, flags={name: ("settings", value) for name, value in values.items()}
    )
    pipeline.run(config)
    return Trained(folder, stage)


def _path(model: Model) -> str:
    return str(model.path if isinstance(model, Trained) else model)


def _sources(data: Source | Sequence[Source]) -> Sequence[Source]:
    """Return the sources one by one. A list of dictionaries is rows, unless each of them names a path."""
    if isinstance(data, str | Path | Mapping | datasets.Dataset):
        return [data]
    items = list(data)
    are_rows = all(isinstance(item, Mapping) and "path" not in item for item in items)
    return [items] if are_rows else items


def _source(source: Source, folder: Path) -> Any:
    """Return a source as a configuration has it; rows are written into the run's folder, under a name of their own."""
    if isinstance(source, Mapping):
        return dict(source) | {"path": _source(source["path"], folder)} if "path" in source else dict(source)
    if isinstance(source, str | Path):
        return str(source)
    lines = [_line(number, row) for number, row in enumerate(source)]
    if not lines:
        raise DataError(
            "the data has no rows", hint="give at least one dictionary, or a Dataset that is not empty"
        )
    file = folder / ".data" / f"{content_hash(*lines)[:16]}.jsonl"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, "".join(lines))
    return str(file)


def _line(number: int, row: Any) -> str:
    if not isinstance(row, Mapping):
        raise DataError(
            f"row {number} of the data is {type(row).__name__}, not a dictionary",
            hint='give rows such as {"prompt": "Hello", "response": "Good day!"}',
        )
    for name, value in row.items():
        try:
            json.dumps(value, allow_nan=True)
        except (TypeError, ValueError) as error:
            raise DataError(
                f"row {number} of the data, column {name}: {error}",
                hint="give texts, numbers, lists and dictionaries; leave other columns out",
            ) from error
    return json.dumps(dict(row), ensure_ascii=False) + "\n"


def _reward_terms(reward: Reward | Sequence[Reward] | Mapping[Reward, float]) -> list[dict[str, Any]]:
    """Return reward functions by name, with their weights."""
    if isinstance(reward, str) or callable(reward):
        reward = [reward]
    weights: Iterable[tuple[Reward, float]] = (
        reward.items() if isinstance(reward, Mapping) else ((one, 1.0) for one in reward)
    )
    terms: list[dict[str, Any]] = [
        {"function": one if isinstance(one, str) else _name_of(one), "weight": weight}
        for one, weight in weights
    ]
    for number, term in enumerate(terms):
        if any(term["function"] == other["function"] for other in terms[:number]):
            raise ConfigError(
                f"two reward functions are called {term['function'].rpartition(':')[2]}",
                hint="give each a name of its own, by which metrics and a resumed run know it",
            )
    return terms


def _name_of(function: Callable[..., Any]) -> str:
    """Return `module:name` by which a function is found again; one that no module has is kept in a module of ours."""
    place, name = (
        getattr(function, "__module__", None),
        getattr(function, "__name__", type(function).__name__),
    )
    if place in sys.modules and getattr(sys.modules[place], name, None) is function:
        return f"{place}:{name}"
    module = sys.modules.setdefault(_FUNCTIONS, ModuleType(_FUNCTIONS))
    if name == "<lambda>":
        code = function.__code__
        name = f"lambda_{content_hash(code.co_code.hex(), repr(code.co_consts), code.co_names)[:8]}"
    setattr(module, name, function)
    return f"{_FUNCTIONS}:{name}"
