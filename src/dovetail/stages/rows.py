"""The rows of the stages, tokenised and packed, and what became of those that did not fit.

Responsible for: rows of each stage as its loop takes them. Not responsible for: reading and blending (data/).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
from transformers import PreTrainedModel

from dovetail.batches import PackedBatch, RankedBatch, pack, pack_ranked
from dovetail.config.data import DataConfig
from dovetail.config.run import RunConfig
from dovetail.data.blend import load_stage
from dovetail.data.loader import BatchOrder
from dovetail.data.records import Prompt
from dovetail.data.tokenize import (
    TokenizedComparisons,
    TokenizedRows,
    fitting_prompts,
    tokenize_comparisons,
    tokenize_demonstrations,
    tokenize_texts,
)
from dovetail.errors import DataError, ModelError
from dovetail.model.forward import context_of, vocabulary_of
from dovetail.rlhf.tasks.named import load_training_tasks
from dovetail.rlhf.tasks.subject import Drawing, Task
from dovetail.stages.context import Context
from dovetail.telemetry.log import say
from dovetail.text.chat_format import ChatFormat

RowsT = TypeVar("RowsT", TokenizedRows, TokenizedComparisons)
Part = Literal["train", "held_out"]


def pack_rows(rows: TokenizedRows, index: Sequence[int]) -> PackedBatch:
    """Pack the given rows with their loss masks, end to end."""
    picked = [rows[i] for i in index]
    return pack([ids for ids, _ in picked], [mask for _, mask in picked])


def pack_comparisons(rows: TokenizedComparisons, index: Sequence[int]) -> RankedBatch:
    """Pack the given prompts with all their answers and pairs, end to end."""
    picked = [rows[i] for i in index]
    return pack_ranked([answers for answers, _ in picked], [pairs for _, pairs in picked])


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


def training_tasks(config: RunConfig) -> dict[str, Task]:
    """Load the tasks that the actor is judged on during PPO, with as many rows as other evaluations use."""
    drawing = Drawing(max_new_tokens=config.ppo.sampling.max_new_tokens)
    return load_training_tasks(config.ppo.eval_tasks, drawing, limit=config.data.max_eval_rows)


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
