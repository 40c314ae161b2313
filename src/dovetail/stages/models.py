"""The models of the stages, as a run's configuration describes them.

Responsible for: chat formats, models ready to train, the engine of PPO, and the centring of a reward model.
Not responsible for: the loops (sft.py, reward.py, ppo.py), rows (rows.py), loading (model/load.py).
"""

from typing import Literal

import numpy as np
import torch
from transformers import PreTrainedModel

from dovetail.batches import pack
from dovetail.config.model import ModelConfig
from dovetail.config.stages import StageConfig
from dovetail.data.records import best_of
from dovetail.data.tokenize import (
    TokenizedComparisons,
)
from dovetail.model.forward import last_hidden_states, plain_model, scalar_head
from dovetail.model.heads import centre_on
from dovetail.model.load import (
    expect_rows_for,
    load_causal_lm,
    load_scalar_model,
)
from dovetail.model.lora import add_lora
from dovetail.parallel.shard import sharding_of
from dovetail.rlhf.algorithms.protocol import Algorithm
from dovetail.rlhf.api import RLHFEngine
from dovetail.rlhf.build import Setup, checkpoint_activations, loading_device
from dovetail.rlhf.rewards import expect_room
from dovetail.stages.context import Context
from dovetail.stages.saving import expect_savable
from dovetail.stages.starts import actor_of, reward_model_of, reward_start_of
from dovetail.text.chat_format import ChatFormat
from dovetail.text.tokenizer import load_tokenizer

CENTRING_ROWS = 512
"""Demonstrations whose mean score becomes 0: enough for a standard error of a twentieth of the spread."""


def chat_of(model: ModelConfig) -> ChatFormat:
    """Load the chat format of a pretrained model."""
    return ChatFormat(
        load_tokenizer(
            model.path,
            revision=model.revision,
            trust_remote_code=model.trust_remote_code,
            chat_template=model.chat_template,
        )
    )


def trainable_causal_lm(
    model: ModelConfig, chat: ChatFormat, settings: StageConfig, context: Context
) -> PreTrainedModel:
    """Load the pretrained actor, ready for gradients."""
    loaded = _causal_lm(model, context)
    expect_rows_for(chat.tokenizer, loaded, model.path)
    return ready_to_train(loaded, model, settings, context, role="actor")


def ready_to_train(
    loaded: PreTrainedModel,
    model: ModelConfig,
    settings: StageConfig,
    context: Context,
    *,
    role: Literal["actor", "critic"],
) -> PreTrainedModel:
    """Adapters if asked for, on the devices, activation checkpointing if asked for or needed, training mode.

    role: whose settings say how the processes hold it.
    """
    if model.lora is not None:
        loaded = add_lora(
            loaded,
            rank=model.lora.rank,
            alpha=model.lora.alpha,
            dropout=model.lora.dropout,
            target_modules=model.lora.target_modules,
            seed=context.config.seed,
        )
    loaded.train()
    context.sharing.shard(loaded, role, context.device)
    checkpoint_activations([loaded], settings, device=context.device, is_averaged=False)
    return loaded


def _causal_lm(model: ModelConfig, context: Context) -> PreTrainedModel:
    return load_causal_lm(
        model.path,
        dtype=context.dtype,
        device=loading_device(context.device, context.world),
        revision=model.revision,
        trust_remote_code=model.trust_remote_code,
    )


def _scalar_model(model: ModelConfig, chat: ChatFormat, context: Context) -> PreTrainedModel:
    return load_scalar_model(
        model.path,
        dtype=context.dtype,
        device=loading_device(context.device, context.world),
        seed=context.config.seed,
        pad_token_id=chat.tokenizer.pad_token_id,
        revision=model.revision,
        trust_remote_code=model.trust_remote_code,
    )


def actor_start(context: Context) -> tuple[ModelConfig, ChatFormat]:
    """Return what PPO or DPO starts from, stage 1's result or the pretrained actor, and its chat format."""
    start = actor_of(context)
    return start, chat_of(start)


def rlhf_engine(
    start: ModelConfig, chat: ChatFormat, context: Context, algorithm: Algorithm, *, total_steps: int
) -> RLHFEngine:
    """Actor from what `actor_start` says, critic and reward from stage 2, with what trains them."""
    config = context.config
    scored = reward_model_of(context)
    scored_chat = scored and chat_of(scored)
    critic = scored or config.reward_model
    engine = RLHFEngine(
        actor_model=_causal_lm(start, context),
        critic_model=_scalar_model(scored, scored_chat, context) if scored and scored_chat else None,
        tokenizer=chat.tokenizer,
        total_steps=total_steps,
        config=config.ppo,
        algorithm=algorithm,
        setup=Setup(
            device=config.device,
            precision=config.precision,
            seed=config.seed,
            actor_lora=config.actor.lora,
            critic_lora=critic.lora if critic else None,
            reward_tokenizer=scored_chat.tokenizer if scored_chat else None,
            sharing=context.sharing,
        ),
    )
    # A reward model that reads the actor's tokens is what the critic is a copy of; another reads text of its own.
    for role, model in (("actor", engine.roles.actor), ("critic", engine.roles.critic)):
        if model is None:
            continue
        expect_room(
            role,
            plain_model(model).config,
            max_prompt_tokens=config.data.max_prompt_tokens,
            max_new_tokens=config.ppo.sampling.max_new_tokens,
        )
    actor, stops = engine.roles.actor, engine.roles.chat.stop_token_ids
    expect_savable(actor, engine.tokenizer, context.folder.model("ppo"), stop_token_ids=stops)
    return engine


def reward_start(context: Context) -> tuple[ModelConfig, ChatFormat]:
    """Return what stage 2 starts from, and the chat format of its tokenizer."""
    start = reward_start_of(context)
    return start, chat_of(start)


def trainable_scalar_model(start: ModelConfig, chat: ChatFormat, context: Context) -> PreTrainedModel:
    """Load the reward model before training: backbone and a fresh head, or a finished reward model's."""
    model = _scalar_model(start, chat, context)
    expect_rows_for(chat.tokenizer, model, start.path)
    return ready_to_train(model, start, context.config.reward, context, role="critic")


@torch.no_grad()
def centre_on_demonstrations(
    model: PreTrainedModel, comparisons: TokenizedComparisons, context: Context
) -> dict[str, float]:
    """Shift the scores so that good answers have mean 0 (InstructGPT, section 3.5).

    The best answer of each comparison is what a demonstration would be, and is there in every run.
    """
    # From all over, because rows of one source stand together.
    places = np.linspace(0, len(comparisons) - 1, min(len(comparisons), CENTRING_ROWS)).astype(int)
    rows = [comparisons[int(i)] for i in places]
    best = [
        answers[best_of(len(answers), [(better, worse) for better, worse, *_ in pairs])]
        for answers, pairs in rows
    ]
    batch = pack(best, [[False] * len(ids) for ids in best])
    model.train(False)
    parts = batch.micro_batches(context.config.reward.micro_batch_tokens)
    with sharding_of(model).resharded_after_use():
        hidden_ND = torch.cat([last_hidden_states(model, part.to(context.device)) for part in parts])
        centring = centre_on(model, hidden_ND, scalar_head(model, hidden_ND))
    return {"centred_by": centring.mean_before, "centring_disturbance": centring.disturbance}
