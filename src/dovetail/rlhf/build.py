"""Make the roles of PPO and their optimisers from names, folders or modules.

Responsible for: who is a copy of whom, which tokenizer scores, which weights learn.
Not responsible for: reading weights (model/load.py), using the roles (rlhf/roles.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dovetail.config.model import LoraConfig
from dovetail.config.stages import OptimizerConfig, PpoConfig, StageConfig
from dovetail.data.records import Message
from dovetail.engine.hybrid import HybridEngine
from dovetail.engine.kv_cache import free_bytes
from dovetail.errors import ConfigError, DataError
from dovetail.model.copies import copy_of
from dovetail.model.dropout import disable_dropout
from dovetail.model.forward import is_probed
from dovetail.model.load import expect_reward_head, expect_rows_for, load_causal_lm, load_scalar_model
from dovetail.model.lora import add_lora
from dovetail.model.placement import resolve_device, resolve_dtype
from dovetail.model.probe import expect_no_noise, probe
from dovetail.model.scalar import scalar_model_from
from dovetail.parallel.shard import sharding_of
from dovetail.parallel.sharing import Sharing
from dovetail.parallel.world import World
from dovetail.planning.memory import USABLE, needed_bytes, total
from dovetail.rlhf.algorithms.protocol import Algorithm
from dovetail.rlhf.environments import Environments, EnvironmentSource, environments_of
from dovetail.rlhf.reward_functions import (
    EnvironmentScorer,
    MissingScores,
    function_scorer,
    load_reward_function,
)
from dovetail.rlhf.rewards import (
    ClippedScorer,
    FirstRankScorer,
    Part,
    RewardFunction,
    RewardModelScorer,
    Scorer,
    WeightedSum,
)
from dovetail.rlhf.roles import Roles
from dovetail.rlhf.splitting import split_to_generate
from dovetail.rlhf.update import CriticWarmup, Learners
from dovetail.telemetry.log import say
from dovetail.text.chat_format import ChatFormat
from dovetail.text.tokenizer import load_tokenizer
from dovetail.training.optim import Ema, Optimizer, build_optimizer
from dovetail.training.step import TokenBudget
from dovetail.training.step_memory import held_as


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """The device, precision, seed, adapters and processes that the models are made with."""

    device: str = "auto"
    precision: str = "auto"
    seed: int = 0
    actor_lora: LoraConfig | None = None
    critic_lora: LoraConfig | None = None
    reward_tokenizer: PreTrainedTokenizerBase | None = None
    """The reward model's, when it is passed in as a module and has one of its own."""
    sharing: Sharing = field(default_factory=Sharing)
    """The processes that hold the models together, and how."""


def make_roles(  # noqa: PLR0913 -- every one is a part that a caller may bring along
    actor_model: str | PreTrainedModel,
    critic_model: str | PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    reward: RewardFunction | None,
    config: PpoConfig,
    setup: Setup,
    algorithm: Algorithm,
    environment: EnvironmentSource | None = None,
) -> Roles:
    """Actor, reference, scorer, and a critic if the algorithm has one; dropout off everywhere, all but actor and critic
    frozen."""
    sharing, world = setup.sharing, setup.sharing.world
    device = world.device(resolve_device(setup.device))
    at = loading_device(device, world)
    dtype = resolve_dtype(setup.precision, device)
    chat = ChatFormat(tokenizer)
    environments = environments_of(environment, config.environment, chat)
    budget = TokenBudget(config.micro_batch_tokens, may_shrink=sharing.may_retry)
    actor = (
        load_causal_lm(actor_model, dtype=dtype, device=at)
        if isinstance(actor_model, str)
        else _moved(actor_model, at)
    )
    expect_rows_for(tokenizer, actor, name_of(actor_model))
    reward_model, reward_chat = _reward_model(critic_model, chat, dtype, at, setup)
    # A critic reads the actor's tokens: with another tokenizer it cannot start from the reward model.
    critic: PreTrainedModel | None = None
    if algorithm.needs_critic and reward_model is not None and reward_chat is None:
        critic = copy_of(reward_model)
    elif algorithm.needs_critic:
        critic = scalar_model_from(actor, seed=setup.seed, pad_token_id=tokenizer.pad_token_id)
    # One after the other, so that no process has more in host memory than it must while they are sharded.
    model_scorer = None
    if reward_model is not None:
        sharing.shard(reward_model, "reward_model", device)
        model_scorer = RewardModelScorer(reward_model, budget, device, reward_chat)
    score, score_clip = _scorer(model_scorer, reward, environments, config, world)
    if critic is not None:
        critic = _trainable(critic, setup.critic_lora, seed=setup.seed + 1)
        sharing.shard(critic, "critic", device)
    reference = None if setup.actor_lora else _frozen(copy_of(actor))
    if reference is not None:
        sharing.shard(reference, "reference", device)
    actor = _trainable(actor, setup.actor_lora, seed=setup.seed)
    sharing.shard(actor, "actor", device)
    learning = [actor] if critic is None else [actor, critic]
    checkpoint_activations(learning, config, device=device, is_averaged=True)
    return Roles(
        actor=actor,
        critic=critic,
        reference=reference,
        score=score,
        reward_model=reward_model,
        chat=chat,
        engine=_generator(learning, config, setup, device, has_environments=environments is not None),
        device=device,
        budget=budget,
        score_clip=score_clip,
        algorithm=algorithm,
        environments=environments,
    )


def _generator(
    learning: Sequence[PreTrainedModel],
    config: PpoConfig,
    setup: Setup,
    device: torch.device,
    *,
    has_environments: bool,
) -> HybridEngine:
    """Make the engine that generates: with the model itself, gathered copies of it, or slices.

    Slices draw token by token together, and the replies of environments come at another moment in each process.
    learning: the actor first, then a critic if there is one.
    """
    actor = learning[0]
    states = int(sum(total(held_as(model, is_averaged=model is actor).states()) for model in learning))
    split = split_to_generate(
        actor,
        setup.sharing.tensor_parallel.generation,
        config,
        room=int(USABLE * free_bytes(device)) - (0 if config.offload_while_generating else states),
        world=setup.sharing.world,
        device=device,
    )
    if split is None:
        sharded = sharding_of(actor)
        return HybridEngine(sharded.generation_model, device=device, weights=sharded.unsharded)
    if has_environments:
        raise ConfigError(
            f"{split.group.size} processes would generate together, and with an environment each must do so by itself",
            hint="set tensor_parallel.generation=1",
        )
    return HybridEngine(split.modules, device=device, weights=split.filled, group=split.group)


def loading_device(device: torch.device, world: World) -> torch.device:
    """Return where a model is loaded: in a group, into host memory, from which each rank takes its shards."""
    return torch.device("cpu") if world.is_group else device


def make_learners(roles: Roles, config: PpoConfig, *, total_steps: int) -> Learners:
    """Optimisers with float32 master weights, and the moving average of the actor."""
    actor = optimizer_for(roles.actor, config.actor_optimizer)
    return Learners(
        actor=actor,
        critic=optimizer_for(roles.critic, config.critic_optimizer) if roles.critic is not None else None,
        ema=Ema(roles.actor, decay=config.ema_decay, optimizer=actor),
        total_steps=total_steps,
        warmup=CriticWarmup.of_run(
            max_rollouts=config.critic_warmup_rollouts if roles.critic is not None else 0,
            rollouts_of_run=total_steps // (config.ppo_epochs * config.minibatches),
        ),
        offloads=config.offload_while_generating and roles.device.type != "cpu",
    )


def optimizer_for(model: PreTrainedModel, settings: OptimizerConfig) -> Optimizer:
    """AdamW over the trainable weights of `model`."""
    return build_optimizer(
        model,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        betas=settings.betas,
        eps=settings.eps,
    )


def checkpoint_activations(
    models: Sequence[PreTrainedModel], settings: StageConfig, *, device: torch.device, is_averaged: bool
) -> None:
    """Let the models of a stage recompute activations, if asked for, or on auto if a step would not fit otherwise.

    To be called when they are on the device with all that stays there, and before their optimisers are made: what
    is free then must hold the states of all, and the activations of one at a time. is_averaged: the first has a
    moving average.
    """
    wanted = settings.activation_checkpointing
    if wanted == "auto" and device.type != "cpu":
        held = [held_as(m, is_averaged=is_averaged and m is models[0]) for m in models]
        needed = needed_bytes(held, tokens=settings.micro_batch_tokens)
        free = free_bytes(device)
        # Neighbours that compute each layer together would wait for one another's second pass.
        wanted = any(sharding_of(models[0]).world.everyone.gather(needed > USABLE * free))
        if wanted:
            say(
                f"activation checkpointing is on: a step of {settings.micro_batch_tokens} tokens would need about "
                f"{needed / 2**30:.1f} GiB beside the weights, {free / 2**30:.1f} GiB are free"
            )
    if wanted is True:
        for model in models:
            model.gradient_checkpointing_enable({"use_reentrant": False})


def same_tokens(one: ChatFormat, other: ChatFormat) -> bool:
    """Return whether the two encode conversations alike, with and without a system message, of one turn and several."""
    if not one.tokenizer.get_vocab().items() <= other.tokenizer.get_vocab().items():
        return False
    turns: list[Message] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Héllo, what is 12 x 7?\n"},
        {"role": "assistant", "content": "84."},
        {"role": "user", "content": "And 12 x 8?"},
        {"role": "assistant", "content": "96."},
    ]
    probes = (turns[1:3], turns[1:], turns[:3], turns)
    return all(_encoded(one, probe) == _encoded(other, probe) for probe in probes)


def _encoded(chat: ChatFormat, messages: Sequence[Message]) -> Any:
    """Encode a conversation; None if the template refuses it."""
    try:
        return chat.conversation(messages)
    except DataError:
        return None


def _reward_model(
    critic_model: str | PreTrainedModel | None,
    chat: ChatFormat,
    dtype: torch.dtype,
    device: torch.device,
    setup: Setup,
) -> tuple[PreTrainedModel | None, ChatFormat | None]:
    """Load and freeze the reward model; returns it with its chat format, if that is not the actor's."""
    if critic_model is None:
        return None, None
    if isinstance(critic_model, str):
        expect_reward_head(critic_model)
        tokenizer = setup.reward_tokenizer or load_tokenizer(critic_model)
        model = load_scalar_model(
            critic_model, dtype=dtype, device=device, seed=setup.seed, pad_token_id=tokenizer.pad_token_id
        )
    else:
        tokenizer, model = setup.reward_tokenizer or chat.tokenizer, _moved(critic_model, device)
    expect_rows_for(tokenizer, model, name_of(critic_model))
    own_chat = ChatFormat(tokenizer)
    return _frozen(model), None if same_tokens(chat, own_chat) else own_chat


def _scorer(
    model_scorer: RewardModelScorer | None,
    reward: RewardFunction | None,
    environments: Environments | None,
    config: PpoConfig,
    world: World,
) -> tuple[Scorer, float | None]:
    """Return what scores answers, and the limit of its scores: those of a reward model alone have one."""
    functions = _function_parts(reward, config, world)
    if environments is None:
        return _scorer_of_answers(model_scorer, functions, config)
    fallback = config.environment.fallback if config.environment else None
    missing = MissingScores(f"environment {environments.name}", fallback)
    if environments.pays and not functions:
        return EnvironmentScorer(missing, None), None
    others, score_clip = _scorer_of_answers(model_scorer, functions, config)
    return EnvironmentScorer(missing, ClippedScorer(others, score_clip)), None


def _scorer_of_answers(
    model_scorer: RewardModelScorer | None, functions: Sequence[Part], config: PpoConfig
) -> tuple[Scorer, float | None]:
    """Return the reward model, functions or both as one scorer."""
    if model_scorer is None and not functions:
        raise ConfigError(
            "PPO has neither a reward model nor a reward function",
            hint="train stage 2 first, give reward_model.path, or set ppo.reward_function=module:function",
        )
    if model_scorer is not None and not functions:
        return model_scorer, config.score_clip
    weight = config.reward_function_weight
    if model_scorer is None or weight is None:
        return WeightedSum(functions), None
    model = Part("model", ClippedScorer(model_scorer, config.score_clip))
    return WeightedSum([model, *(replace(part, weight=part.weight * weight) for part in functions)]), None


def _function_parts(reward: RewardFunction | None, config: PpoConfig, world: World) -> list[Part]:
    """Return the reward functions as parts of a sum: the one that is given, or those of the configuration."""
    if reward is not None:
        scorers = [(function_scorer(reward, getattr(reward, "__name__", "reward")), 1.0)]
    else:
        scorers = [
            (
                load_reward_function(term.function, time_limit=term.time_limit, fallback=term.fallback),
                term.weight,
            )
            for term in config.reward_function
        ]
    for place, (scorer, _) in enumerate(scorers):
        if scorer.label in [earlier.label for earlier, _ in scorers[:place]]:
            scorer.label += f"_{place + 1}"  # functions of two files may have one name, metrics may not
    return [
        Part(scorer.label, FirstRankScorer(scorer, world) if world.size > 1 else scorer, weight)
        for scorer, weight in scorers
    ]


def name_of(model: str | PreTrainedModel) -> str:
    """Return the name or folder that a model was loaded from, or its class if it was made in memory."""
    return model if isinstance(model, str) else str(model.config._name_or_path) or type(model).__name__


def _moved(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """Move a module that was passed in to where the others are loaded, and try it as they are tried."""
    nn.Module.to(model, device)
    disable_dropout(model)
    if not is_probed(model):
        probe(model)
        expect_no_noise(model)
    return model


def _frozen(model: PreTrainedModel) -> PreTrainedModel:
    model.requires_grad_(False)
    model.train(False)
    return model


def _trainable(model: PreTrainedModel, lora: LoraConfig | None, *, seed: int) -> PreTrainedModel:
    """Make all weights trainable, or add adapters that leave the loaded weights as they are."""
    model.requires_grad_(lora is None)
    if lora is not None:
        model = add_lora(
            model,
            rank=lora.rank,
            alpha=lora.alpha,
            dropout=0.0,
            target_modules=lora.target_modules,
            seed=seed,
        )
    model.train()  # dropout stays off (disable_dropout); activation checkpointing works in this mode alone
    return model
