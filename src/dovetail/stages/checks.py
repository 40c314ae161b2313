"""Check in one pass everything of a run that can be known before its first stage.

Responsible for: finding every problem of data, models, devices, packages and folder, and raising them as one error.
Not responsible for: weights, and what only the rows as tokens would show (rows.py).
"""

import importlib.util
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import AutoModelForCausalLM

from dovetail.config.model import LoraConfig, ModelConfig
from dovetail.config.run import ROWS_OF, RunConfig, StageName
from dovetail.data.blend import load_stage, sources_of
from dovetail.data.label_rows import is_labels
from dovetail.data.records import Kind
from dovetail.data.sources import expect_there
from dovetail.errors import ConfigError, DovetailError, ModelError
from dovetail.model.load import expect_causal_lm, expect_rows, expect_supported, read_config
from dovetail.model.lora import add_lora
from dovetail.model.placement import resolve_device
from dovetail.parallel.grid import expect_even_groups
from dovetail.parallel.tensor_plan import TRAINING, expect_divisible
from dovetail.parallel.world import World
from dovetail.rlhf.algorithms.named import algorithm_named
from dovetail.rlhf.build import same_tokens
from dovetail.rlhf.environments import load_environment
from dovetail.rlhf.reward_functions import load_reward_function
from dovetail.rlhf.rewards import expect_room
from dovetail.rlhf.splitting import expect_possible
from dovetail.runs.run_folder import RunFolder
from dovetail.stages.models import chat_of
from dovetail.stages.rows import training_tasks
from dovetail.stages.starts import actor_of, reward_model_of, reward_start_of
from dovetail.text.chat_format import ChatFormat, template_ids

T = TypeVar("T")

_ANEW = "the download or copy was cut off; get the folder anew"


def refuse(config: RunConfig, world: World, *more: Callable[[], None]) -> None:
    """Raise every problem that would end the run later, as one error.

    world: the processes that will do it. more: further checks, each of which raises a DovetailError.
    """
    run, look = _Outlook(config), _Look()
    for check in more:
        look.at(check)
    look.at(lambda: run.folder.expect_usable(config.model_dump(mode="json")))
    look.at(lambda: resolve_device(config.device))
    look.at(lambda: _expect_packages(config))
    for kind in run.kinds_of_rows():
        _look_at_rows(run, kind, look)
    _look_at_models(run, world, look)
    if "ppo" in run.pending:
        look.at(lambda: algorithm_named(config.algorithm, config.policy, config.ppo))
        for term in config.ppo.reward_function:
            look.at(partial(load_reward_function, term.function))
        look.at(partial(training_tasks, config))
        if config.ppo.environment is not None:
            look.at(partial(load_environment, config.ppo.environment.source))
    look.raise_found()


class _Outlook:
    """A run as it stands in its folder (starts.Run), and the stages that are still to do."""

    def __init__(self, config: RunConfig) -> None:
        self.config, self.folder = config, RunFolder(config.output_dir)
        self.pending = [stage for stage in config.stages if not self.folder.is_done(stage)]

    def is_done(self, stage: StageName) -> bool:
        """Return whether the stage has finished."""
        return self.folder.is_done(stage)

    def kinds_of_rows(self) -> Iterator[Kind]:
        """Yield the kinds of rows that the stages still to do read."""
        yield from (ROWS_OF[stage] for stage in self.pending)
        if "ppo" in self.pending and self.config.data.pretraining:
            yield "text"

    def reward_start(self) -> ModelConfig:
        """Return what stage 2 starts from, or the actor that stage 1 will have trained by then."""
        is_from_sft = self.config.reward.start_from == "sft"
        return self.config.actor if is_from_sft and "sft" in self.pending else reward_start_of(self)

    def reward_model(self) -> ModelConfig | None:
        """Return what PPO scores with, or the model that stage 2 will make it from."""
        return self.reward_start() if "reward" in self.pending else reward_model_of(self)


@dataclass(slots=True)
class _Look:
    """The problems found so far."""

    found: dict[str, DovetailError] = field(default_factory=dict)

    def at(self, check: Callable[[], T]) -> T | None:
        """Return what the check returns, or keep its error and return None."""
        try:
            return check()
        except DovetailError as error:
            self.found.setdefault(error.message, error)
            return None

    def raise_found(self) -> None:
        """Raise the only error as it is, several as a list; nothing if there is none."""
        if len(self.found) == 1:
            raise next(iter(self.found.values()))
        if self.found:
            lines = [
                f"\n  {number}. {error.message}{f' ({error.hint})' if error.hint else ''}"
                for number, error in enumerate(self.found.values(), start=1)
            ]
            raise ConfigError(
                f"{len(lines)} problems, found before anything was started:{''.join(lines)}",
                hint="repair them and give the same command again; with --dry-run it only looks",
            )


def _expect_packages(config: RunConfig) -> None:
    """Raise ConfigError that names the packages which the settings need and Python does not find."""
    databases = [source.path for source in config.data.blend if is_labels(source.path)]
    wanted = {
        "tensorboard": ("tracking.tensorboard = true", config.tracking.tensorboard),
        "wandb": (f"tracking.wandb_project = {config.tracking.wandb_project}", config.tracking.wandb_project),
        "psycopg": ("a database of labels", any("postgresql" in path for path in databases)),
    }
    for package, (reason, is_wanted) in wanted.items():
        if is_wanted and importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"{reason} needs the package {package}, which is not installed",
                hint=f"pip install {package}, or change the setting",
            )


def _look_at_rows(run: _Outlook, kind: Kind, look: _Look) -> None:
    """Look whether every source is there, and read what lies on this machine; of the hub only names are asked."""
    data = run.config.data_of_stages()
    listed = look.at(partial(sources_of, data, kind)) or []
    before = len(look.found)
    on_hub = []
    for source, _ in listed:
        if not is_labels(source.path):
            look.at(partial(expect_there, source))
            on_hub += [source] if not Path(source.path).expanduser().exists() else []
    if listed and not on_hub and len(look.found) == before:
        look.at(partial(load_stage, data, kind, "train"))


@dataclass(frozen=True, slots=True)
class _Seen:
    """The facts about a model that need no weights; a .gguf file keeps its config among them."""

    config: Any | None
    chat: ChatFormat


def _look_at_models(run: _Outlook, world: World, look: _Look) -> None:
    """Look at the models that the stages still to do start from, and at what they are to do together."""
    config, seen = run.config, dict[str, _Seen | None]()
    looked_at: list[ModelConfig] = []  # one model in two roles has each problem once
    starts: dict[str, Callable[[], ModelConfig | None]] = {}
    if {"sft", "ppo", "dpo"} & set(run.pending):
        starts["actor"] = partial(actor_of, run)
    if {"reward", "ppo"} & set(run.pending):
        starts["reward model"] = run.reward_model if "ppo" in run.pending else run.reward_start
    for role, start in starts.items():
        model = look.at(start)
        if model is not None and model not in looked_at:
            looked_at.append(model)
            seen[role] = look.at(partial(_seen, model, role))
    shapes = {role: found.config for role, found in seen.items() if found is not None and found.config}
    _look_at_tensor_parallel(config, world, shapes, look)
    if "ppo" in run.pending:
        _look_at_room(config, seen, look)


def _seen(model: ModelConfig, role: str) -> _Seen:
    """Read config and tokenizer of a model; raises ModelError for what would keep it from training."""
    config = read_config(model.path, revision=model.revision, trust_remote_code=model.trust_remote_code)
    if config is not None and role == "actor":
        expect_causal_lm(model.path, config)
    expect_supported(model.path, revision=model.revision, trust_remote_code=model.trust_remote_code)
    _expect_weights(Path(model.path).expanduser())
    chat = chat_of(model)
    if config is not None:
        used = sorted(template_ids(chat))
        expect_rows(chat.tokenizer, int(config.get_text_config().vocab_size), model.path, used)
        if model.lora is not None and model.lora.target_modules != "all-linear":
            _expect_adapted_layers(config, model.lora, trust_remote_code=model.trust_remote_code)
    return _Seen(config, chat)


def _expect_weights(folder: Path) -> None:
    """Raise ModelError if a local folder lacks weights that its index names, or has none at all."""
    if not (folder / "config.json").exists():
        return
    try:
        maps = [
            json.loads(file.read_text(encoding="utf-8"))["weight_map"] for file in folder.glob("*.index.json")
        ]
        missing = sorted(
            {name for shards in maps for name in shards.values() if not (folder / name).exists()}
        )
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ModelError(f"the index of weights in {folder} cannot be read: {error!r}", hint=_ANEW) from error
    if missing or not any(file for kind in ("*.safetensors", "*.bin") for file in folder.glob(kind)):
        raise ModelError(
            f"{folder} lacks the weights{f' {missing[0]}' if missing else ''}"
            + (f" and {len(missing) - 1} more files" if len(missing) > 1 else ""),
            hint=_ANEW,
        )


def _expect_adapted_layers(config: Any, lora: LoraConfig, *, trust_remote_code: bool) -> None:
    """Raise ModelError if an adapter is wanted on a layer that the model lacks; no weight is made."""
    with torch.device("meta"):
        auto: Any = AutoModelForCausalLM
        skeleton = auto.from_config(config, trust_remote_code=trust_remote_code)
        add_lora(skeleton, rank=lora.rank, alpha=lora.alpha, target_modules=lora.target_modules, seed=0)


def _look_at_tensor_parallel(config: RunConfig, world: World, shapes: dict[str, Any], look: _Look) -> None:
    """Look whether the models can be divided over as many processes as asked for.

    What only a .gguf file says is found out when it has been read.
    """
    wanted = config.tensor_parallel
    look.at(lambda: wanted.expect_supported(config.zero_stage, config.offload))
    if wanted.generation != "auto" and "ppo" in config.stages and "actor" in shapes:
        look.at(partial(expect_possible, shapes["actor"], wanted.generation, world))
    look.at(lambda: expect_even_groups(world, wanted.training, setting=TRAINING))
    for role, shape in shapes.items():
        look.at(partial(expect_divisible, shape, wanted.training, setting=TRAINING, model=f"the {role}"))


def _look_at_room(config: RunConfig, seen: dict[str, _Seen | None], look: _Look) -> None:
    """Look whether the longest prompt and answer fit into the models that read them.

    A reward model of other tokens reads text of its own, which may be shorter.
    """
    actor = seen.get("actor")
    for role, model in seen.items():
        if actor is not None and model is not None and model.config and same_tokens(actor.chat, model.chat):
            room = partial(
                expect_room,
                role,
                model.config,
                max_prompt_tokens=config.data.max_prompt_tokens,
                max_new_tokens=config.ppo.sampling.max_new_tokens,
            )
            look.at(room)
