"""The parts that stages are built from: tokenizer, rows, models, engine.

Responsible for: turning a run's configuration into what a stage works with, and saying what it found.
Not responsible for: the loops (sft.py, reward.py, ppo.py), reading (data/, model/load.py).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
import torch
from transformers import PreTrainedModel

from dovetail.batches import PackedBatch, RankedBatch, pack, pack_ranked
from dovetail.config.data import DataConfig
from dovetail.config.model import ModelConfig
from dovetail.config.stages import StageConfig
from dovetail.data.blend import load_stage
from dovetail.data.loader import BatchOrder
from dovetail.data.records import Prompt, best_of
from dovetail.data.tokenize import (
    TokenizedComparisons,
    TokenizedRows,
    fitting_prompts,
    tokenize_comparisons,
    tokenize_demonstrations,
    tokenize_texts,
)
from dovetail.engine.modules import context_of, vocabulary_of
from dovetail.errors import DataError, ModelError
from dovetail.model.forward import last_hidden_states, plain_model, scalar_head
from dovetail.model.heads import centre_on
from dovetail.model.load import (
    expect_rows_for,
    load_causal_lm,
    load_scalar_model,
)
from dovetail.model.lora import add_lora
from dovetail.parallel.shard import resharded_after_use
from dovetail.rlhf.api import RLHFEngine
from dovetail.rlhf.build import Setup, checkpoint_activations, loading_device
from dovetail.rlhf.rewards import expect_room
from dovetail.stages.context import Context
from dovetail.stages.saving import expect_savable
from dovetail.stages.starts import actor_of, reward_model_of, reward_start_of
from dovetail.telemetry.log import say
from dovetail.text.chat_format import ChatFormat
from dovetail.text.tokenizer import load_tokenizer

RowsT = TypeVar("RowsT", TokenizedRows, TokenizedComparisons)

CENTRING_ROWS = 512
"""Demonstrations whose mean score becomes 0: enough for a standard error of a twentieth of the spread."""

Part = Literal["train", "held_out"]


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


def pack_rows(rows: TokenizedRows, index: Sequence[int]) -> PackedBatch:
    """Pack the given rows with their loss masks, end to end."""
    picked = [rows[i] for i in index]
    return pack([ids for ids, _ in picked], [mask for _, mask in picked])


def pack_comparisons(rows: TokenizedComparisons, index: Sequence[int]) -> RankedBatch:
    """Pack the given prompts with all their answers and pairs, end to end."""
    picked = [rows[i] for i in index]
    return pack_ranked([answers for answers, _ in picked], [pairs for _, pairs in picked])


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
    """Return what PPO starts from, stage 1's result or the pretrained actor, and its chat format."""
    start = actor_of(context)
    return start, chat_of(start)


def rlhf_engine(start: ModelConfig, chat: ChatFormat, context: Context, *, total_steps: int) -> RLHFEngine:
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
        expect_room(
            role,
            plain_model(model).config,
            max_prompt_tokens=config.data.max_prompt_tokens,
            max_new_tokens=config.ppo.sampling.max_new_tokens,
        )
    actor, stops = engine.roles.actor, engine.roles.chat.stop_token_ids
    expect_savable(actor, engine.tokenizer, context.folder.model("ppo"), stop_token_ids=stops)
    return engine


def demonstration_rows(context: Context, chat: ChatFormat, part: Part) -> TokenizedRows:
    """Demonstrations of stage 1, tokenised; says what became of the rows."""
    data = _data_of(context, part)
    with context.world.first_goes_first():
        return _reported(tokenize_demonstrations(load_stage(data, "sft", part), chat, data))


def comparison_rows(context: Context, chat: ChatFormat, part: Part) -> TokenizedComparisons:
    """Comparisons of stage 2, tokenised; says what became of the rows."""
    data = _data_of(context, part)
    with context.world.first_goes_first():
        return _reported(tokenize_comparisons(load_stage(data, "reward", part), chat, data))


def prompts_of(context: Context, chat: ChatFormat, part: Part) -> list[Prompt]:
    """Return the prompts of stage 3 that fit, with their rows; says what became of the others."""
    data = _data_of(context, part)
    with context.world.first_goes_first():
        prompts = fitting_prompts(load_stage(data, "ppo", part), chat, data)
    for line in prompts.report.lines():
        say(line)
    return list(prompts)


def _data_of(context: Context, part: Part) -> DataConfig:
    """Return the data settings of the run's stages; says what a stage that runs alone takes of the rows."""
    config = context.config
    split = config.data.stage_split
    if (
        part == "train"
        and len(config.stages) == 1
        and any(source.stages is None for source in config.data.blend)
    ):
        takes = "all rows; data.stage_split=[2,4,4] would leave some to the others"
        if split is not None:
            takes = (
                f"its share of data.stage_split = {list(split)}; data.stage_split=null would give it all rows"
            )
        say(f"the stage {config.stages[0]} runs alone and takes {takes}")
    return config.data_of_stages()


@dataclass(frozen=True, slots=True)
class PlainText:
    """The texts of `data.pretraining` for stage 3; both None where it lists nothing."""

    next: Callable[[int], PackedBatch] | None = None
    """The texts that an optimiser step of the actor learns from beside PPO's loss; None: mixture training is off."""
    held_out: PackedBatch | None = None
    """Held-out texts, which show whether the actor forgets its language."""
    fingerprint: str = ""
    """Changes with the texts that are learnt from."""


def plain_text(context: Context, chat: ChatFormat, actor: PreTrainedModel) -> PlainText:
    """Plain text of stage 3; says whether mixture training is on."""
    config, data = context.config.ppo, context.config.data
    if not data.pretraining:
        say("mixture training: off, data.pretraining lists no text")
        return PlainText()
    with context.world.first_goes_first():
        train = _reported(tokenize_texts(load_stage(data, "text", "train"), chat, data))
        held_out = _reported(tokenize_texts(load_stage(data, "text", "held_out"), chat, data))
    expect_rows_fit(actor, train, held_out)
    judged = pack_rows(held_out, range(len(held_out))) if len(held_out) else None
    if config.ptx_coefficient == 0.0:
        say("mixture training: off, ppo.ptx_coefficient = 0")
        return PlainText(held_out=judged)
    order = BatchOrder(len(train), min(config.ptx_batch_size, len(train)), context.config.seed)
    say(f"mixture training: on, {order.batch_size} texts a step, weight {config.ptx_coefficient:g}")
    return PlainText(lambda step: pack_rows(train, order.batch(step)), judged, train.fingerprint)


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
    with resharded_after_use(model):
        hidden_ND = torch.cat([last_hidden_states(model, part.to(context.device)) for part in parts])
        centring = centre_on(model, hidden_ND, scalar_head(model, hidden_ND))
    return {"centred_by": centring.mean_before, "centring_disturbance": centring.disturbance}


def longest_row(rows: TokenizedRows | TokenizedComparisons) -> list[int]:
    """Return the tokens of the longest row, or of the longest answer with its prompt."""
    starts = rows.columns["starts"]
    longest = int(np.diff(starts).argmax())
    tokens: list[int] = rows.columns["tokens"][starts[longest] : starts[longest + 1]].tolist()
    return tokens


def expect_rows_fit(model: PreTrainedModel, *parts: RowsT) -> None:
    """Raise DataError or ModelError if a row is longer than the model can read, or holds a token without a row.

    Positions or embeddings would be read out of bounds, which on a GPU is an assertion that names nothing.
    """
    limit, embedded = context_of(model), vocabulary_of(model)
    for rows in parts:
        highest = int(rows.columns["tokens"].max(initial=-1))
        if highest >= embedded:
            raise ModelError(
                f"a row of the stage {rows.report.stage} holds the token id {highest}, and the model's embedding has "
                f"{embedded} rows",
                hint="make room in the model: model.resize_token_embeddings(len(tokenizer)), then save_pretrained; or "
                "take the token out of the rows",
            )
        longest = int(np.diff(rows.columns["starts"]).max(initial=0))
        if limit is not None and longest > limit:
            raise DataError(
                f"a row of the stage {rows.report.stage} has {longest} tokens, the model's context is {limit}",
                hint=f"set data.max_tokens={limit} or less; data.too_long says what happens to longer rows",
            )


def _reported(rows: RowsT) -> RowsT:
    for line in rows.report.lines():
        say(line)
    return rows
