"""The four models and the moving average under the names that DeepSpeed-Chat gives them, and how they are saved.

Responsible for: `DeepSpeedRLHFEngine`, its `actor`, `critic`, `ref`, `reward` and `actor_ema`, and the functions that
average, merge and save them.
Not responsible for: making the models (rlhf/build.py), what a model folder holds (model/save.py).
"""

from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from torch import nn
from transformers import PreTrainedTokenizerBase

from dovetail.errors import ConfigError
from dovetail.model.forward import plain_model
from dovetail.model.lora import merged_copy
from dovetail.model.save import save_model
from dovetail.parallel.shard import sharding_of
from dovetail.parallel.world import World
from dovetail.rlhf.api import RLHFEngine
from dovetail.rlhf.compat.flags import Role, config_from, setup_from
from dovetail.rlhf.compat.processes import joined_world
from dovetail.rlhf.rewards import RewardModelScorer
from dovetail.text.chat_format import ChatFormat
from dovetail.training.optim import Ema

_OF_THE_PROCESS = ("local_rank", "global_rank", "output_dir")
"""Flags that may differ from process to process."""

_OWN_INIT = ("_init_actor", "_init_ref", "_init_ema", "_init_critic", "_init_reward")


class AbsentError(ConfigError, AttributeError):
    """A name of DeepSpeed's that has no counterpart here; `hasattr` says so too."""


class RoleModel:
    """A model by the predecessor's name for it, with the model's own attributes.

    `module` is the same object, so that scripts that unwrap an engine read the same names.
    """

    def __init__(self, name: str, model: nn.Module) -> None:
        self.name = name
        self.model: Any = model

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """Refuse: the models run over packed tokens, which a padded call does not describe."""
        self._refuse("forward")

    def __getattr__(self, name: str) -> Any:
        model = vars(self).get("model")  # None in a copy that is being made
        if not hasattr(model, name):
            self._refuse(name)
        return getattr(model, name)

    @property
    def module(self) -> "RoleModel":
        """The model itself, because no engine is around it."""
        return self

    @property
    def config(self) -> Any:
        """The configuration of the Hugging Face model."""
        return plain_model(self.model).config

    def state_dict(self) -> Any:
        """Return the weights as a folder of the model has them: adapters merged."""
        return self.finished_here().state_dict()

    def finished_here(self) -> Any:
        """Return a plain model with all that was learnt. Raises ConfigError where processes hold the model together."""
        if sharding_of(self.model).world.size > 1:
            raise ConfigError(
                f"{self.name} is held by {sharding_of(self.model).world.size} processes together",
                hint="call convert_lora_to_linear_layer in all of them, and save what it returns in the first",
            )
        return self.finished()

    def finished(self) -> Any | None:
        """Return a plain model with all that was learnt, in the first process; None in the others. A collective."""
        whole = sharding_of(self.model).for_saving()
        return merged_copy(whole) if hasattr(whole, "peft_config") else whole

    def gradient_checkpointing_enable(self) -> None:
        """Recompute activations in the backward pass from now on."""
        self.model.gradient_checkpointing_enable({"use_reentrant": False})

    def gradient_checkpointing_disable(self) -> None:
        """Keep activations from now on."""
        self.model.gradient_checkpointing_disable()

    def _refuse(self, name: str) -> NoReturn:
        raise AbsentError(
            f"{vars(self).get('name')}.{name}: this attribute does not exist here; forward passes, gradients and "
            "steps are the trainer's own",
            hint="to change the objective, override compute_rewards, get_advantages_and_returns, actor_loss_fn or "
            "critic_loss_fn of the trainer",
        )


class ReferenceModel(RoleModel):
    """The frozen reference. With LoRA it is no model of its own but the actor without its adapters."""

    def __init__(self, reference: nn.Module | None, actor: nn.Module) -> None:
        super().__init__("ref", reference if reference is not None else actor)
        self.is_actor = reference is None

    def __getattr__(self, name: str) -> Any:
        if self.is_actor:
            self._refuse(name)
        return super().__getattr__(name)

    def finished(self) -> Any | None:
        if self.is_actor:
            self._refuse("state_dict")
        return super().finished()


class AveragedModel(RoleModel):
    """The moving average of the actor in float32, which becomes a model when it is saved."""

    def __init__(self, actor: nn.Module, average: Ema) -> None:
        super().__init__("actor_ema", actor)
        self.average = average

    def __getattr__(self, name: str) -> Any:
        self._refuse(name)

    def finished(self) -> Any | None:
        whole = sharding_of(self.model).for_saving(self.average.averages())
        return merged_copy(whole) if hasattr(whole, "peft_config") else whole


class DeepSpeedRLHFEngine:
    """Actor, reference, critic and reward by the predecessor's names, held by all processes that joined."""

    def __init__(
        self,
        actor_model_name_or_path: Any,
        critic_model_name_or_path: Any,
        tokenizer: PreTrainedTokenizerBase,
        args: Namespace,
        num_total_iters: int,
    ) -> None:
        expect_no_overrides(self, _OWN_INIT, "give the models themselves in place of their names")
        self.tokenizer = tokenizer
        self.args = args
        self.num_total_iters = num_total_iters
        config, world = config_from(args), joined_world()
        models: dict[Role, Any] = {"actor": actor_model_name_or_path, "critic": critic_model_name_or_path}
        flags = vars(args) | {f"the {role}": model for role, model in models.items()}
        expect_same_everywhere(world, flags | {"num_total_iters": num_total_iters})
        self.engine = RLHFEngine(
            actor_model=actor_model_name_or_path,
            critic_model=critic_model_name_or_path,
            tokenizer=tokenizer,
            total_steps=num_total_iters,
            config=config,
            setup=setup_from(args, world, models),
        )
        roles = self.engine.roles
        self.actor: Any = RoleModel("actor", roles.actor)
        self.critic: Any = RoleModel("critic", roles.held_critic)
        self.ref: Any = ReferenceModel(roles.reference, roles.actor)
        assert isinstance(roles.score, RewardModelScorer)
        self.reward: Any = RoleModel("reward", roles.score.model)
        averages = getattr(args, "enable_ema", False)
        self.actor_ema: Any = AveragedModel(roles.actor, self.engine.learners.ema) if averages else None


def expect_same_everywhere(world: World, given: Mapping[str, Any]) -> None:
    """Raise ConfigError that names a flag or model in which the processes differ: each would train another model."""
    mine = {name: _in_words(value) for name, value in given.items() if name not in _OF_THE_PROCESS}
    of_ranks = world.gather(mine)
    for name in mine:
        found = [theirs.get(name) for theirs in of_ranks]
        if len(set(found)) > 1:
            raise ConfigError(
                f"the processes were given different values of {name}: {', '.join(map(str, found))}",
                hint="give all of them the same flags and models; only the rows of a batch may differ",
            )


def _in_words(value: Any) -> str:
    """Return a value that can be compared and shown; for a model, its class and the sum of its weights."""
    if not isinstance(value, nn.Module):
        return str(value)
    total = sum(parameter.detach().double().sum().item() for parameter in value.parameters())
    return f"{type(value).__name__} with weights that sum to {total!r}"


def expect_no_overrides(instance: object, names: tuple[str, ...], hint: str) -> None:
    """Raise ConfigError if a subclass defines a method that the predecessor calls and nothing here does."""
    for name in names:
        if hasattr(type(instance), name):
            raise ConfigError(f"{type(instance).__name__}.{name} is never called here", hint=hint)


def moving_average(
    model: Any, model_ema: Any, beta: float = 0.992, device: Any = None, zero_stage: int = 0
) -> None:
    """Move the float32 average towards the actor: average <- beta * average + (1 - beta) * weight.

    device, zero_stage: taken and not needed: the average lies where the actor lies.
    """
    if not isinstance(model_ema, AveragedModel) or getattr(model, "model", None) is not model_ema.model:
        raise ConfigError(
            "moving_average: the two models are not the engine's actor and its actor_ema",
            hint="call moving_average(rlhf_engine.actor, rlhf_engine.actor_ema), with --enable_ema",
        )
    model_ema.average.decay = beta
    model_ema.average.update()


def convert_lora_to_linear_layer(model: Any) -> Any:
    """Return a plain model with all that was learnt, in the first process; `model` itself in the others.

    A collective.
    """
    finished = model.finished() if isinstance(model, RoleModel) else model
    return model if finished is None else finished


def save_hf_format(
    model: Any, tokenizer: PreTrainedTokenizerBase, args: Namespace, sub_folder: str = ""
) -> None:
    """Write a folder under `args.output_dir` that transformers and the predecessor's later scripts load."""
    plain = model.finished_here() if isinstance(model, RoleModel) else model
    folder = Path(args.output_dir) / sub_folder
    save_model(plain, tokenizer, folder, stop_token_ids=ChatFormat(tokenizer).stop_token_ids)


def save_zero_three_model(model_ema: Any, global_rank: int, save_dir: str, zero_stage: int = 0) -> None:
    """Check that `save_hf_format` has written the folder: at every ZeRO stage it writes whole weights here."""
    if global_rank == 0 and not any(Path(save_dir).glob("*.safetensors")):
        raise ConfigError(
            f"save_zero_three_model: there are no weights in {save_dir}",
            hint="call convert_lora_to_linear_layer in all processes, and save_hf_format in the first, as main.py does",
        )
