"""Try a model once, before it is used: find whether and how it can read several sequences together.

Responsible for: the way a model reads a batch, found by comparing each with the plain forward of one sequence; models
that no way serves are refused.
Not responsible for: reading batches (forward.py), generation (engine/), the lengths of a run (engine/parity.py).

A class may say that it uses the attention interface and break its contract: it drops keyword arguments, needs what only
its mask says, or has a module that mixes the whole batch. So the class is tried instead: three short rows are read
alone, packed and padded. Windows and chunks longer than the rows are made short meanwhile, in config and modules alike.

Shapes: T tokens of all rows, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dovetail.batches import pack
from dovetail.errors import DovetailError, ModelError
from dovetail.model.forward import (
    Reading,
    ReadingWay,
    evaluation_mode,
    packing_obstacle,
    plain_model,
    read_by,
    remember_reading,
)
from dovetail.model.layers import few_layers
from dovetail.model.plain_forward import attention_restored, errors_T, plain_attention, plain_hidden_states
from dovetail.model.rope import depends_on_length, give_sequences_their_rope
from dovetail.model.shards import computing_device
from dovetail.model.tolerance import TOLERANCES, first_beyond, is_exact, nudged_embeddings

LONGEST_LIMIT = 256
"""Windows, chunks and the like are made this short, so that a short row goes beyond them."""
_LIMITS = ("window", "chunk_size", "chunk_length", "topk")
_SHORT_ROW = 6


@torch.no_grad()
def probe(model: Any) -> Reading:
    """Find how a model, whole on its device, reads a batch; all later forwards read in that way.

    Raises ModelError for a model that does not read text from left to right.
    """
    inner = plain_model(model)
    give_sequences_their_rope(inner.base_model)
    with evaluation_mode(inner), attention_restored(inner), short_limits(inner), _few_layers(inner):
        reading = _probed(inner)
    remember_reading(inner, reading)
    return reading


@torch.no_grad()
def expect_no_noise(model: PreTrainedModel) -> None:
    """Raise ModelError if the model, its dropout switched off, gives other numbers in training than in evaluation."""
    with evaluation_mode(model), plain_attention(model), short_limits(model), _few_layers(model):
        row = probe_rows(model)[1]
        plain_TD = plain_hidden_states(model, row)
        within = _judge(model, [row], plain_TD)
        nn.Module.train(model)
        with torch.random.fork_rng():
            torch.manual_seed(1)
            trained_TD = plain_hidden_states(model, row)
    if plain_TD.isfinite().all() and not within(trained_TD):
        raise ModelError(
            f"{type(model).__name__} is not supported with this config: in training it gives other numbers than in "
            "evaluation, though dropout is off",
            hint="switch the noise off in its config.json",
        )


def _few_layers(model: PreTrainedModel) -> AbstractContextManager[None]:
    """Keep one layer of each kind: it shows what all do, and costs little where a large model is in host memory."""
    return few_layers(model, lambda: plain_hidden_states(model, probe_rows(model)[-1]))


def _probed(model: PreTrainedModel) -> Reading:
    rows = probe_rows(model)
    plain_TD = _plain_rows(model, rows)
    obstacle = packing_obstacle(model)
    if not plain_TD.isfinite().all():
        return Reading("packed" if obstacle is None else "padded", obstacle)
    within = _judge(model, rows, plain_TD)
    _expect_causal(model, rows, plain_TD, within)
    if obstacle is None:
        obstacle = _difference("packed", model, rows, plain_TD, within)
        if obstacle is None:
            return Reading("packed")
        obstacle = f"{type(model).__name__} is not itself over packed batches ({obstacle})"
    if depends_on_length(model):
        return Reading("alone", f"{obstacle}, and a rope whose frequencies depend on the length read")
    if _difference("padded", model, rows, plain_TD, within) is None:
        return Reading("padded", obstacle)
    return Reading("alone", obstacle)


def _plain_rows(model: PreTrainedModel, rows: Sequence[Sequence[int]]) -> Tensor:
    """Return [T, D], each row read alone; raises ModelError for a class that cannot."""
    name = type(model).__name__
    if model.base_model is model:
        raise ModelError(
            f"{name} is not supported: its class has no backbone apart from its head",
            hint="take another causal language model of text",
        )
    try:
        with plain_attention(model):
            return torch.cat([plain_hidden_states(model, row) for row in rows])
    except DovetailError:
        raise
    except Exception as error:  # whatever a class asks for beyond tokens
        raise ModelError(
            f"{name} is not supported: its backbone does not read the tokens of a text alone ({_first_line(error)})",
            hint="take another causal language model of text",
        ) from error


def probe_rows(model: PreTrainedModel) -> list[list[int]]:
    """Return three rows of different lengths, the longest beyond every window and chunk of the model."""
    config = model.config.get_text_config()
    limits = [value for holder in _holders(model) for _, value in _limits_of(holder)]
    longest = max([24, *limits]) + 24
    context = getattr(config, "max_position_embeddings", None) or longest
    embeddings: Any = model.get_input_embeddings()
    special = {
        value for key, value in vars(config).items() if key.endswith("_token_id") and isinstance(value, int)
    }
    ids = [i for i in range(3, min(embeddings.num_embeddings, 20000)) if i not in special] or [0]
    drawn = torch.randint(len(ids), (longest,), generator=torch.Generator().manual_seed(0)).tolist()
    row = [ids[i] for i in drawn][: int(context)]
    return [row, row[len(row) // 3 :], row[:_SHORT_ROW]]


@contextmanager
def short_limits(model: PreTrainedModel) -> Iterator[None]:
    """Shorten every window, chunk and the like to LONGEST_LIMIT within the block."""
    changed = [
        (holder, name, value)
        for holder in _holders(model)
        for name, value in _limits_of(holder)
        if value > LONGEST_LIMIT
    ]
    for holder, name, _ in changed:
        vars(holder)[name] = LONGEST_LIMIT
    try:
        yield
    finally:
        for holder, name, value in changed:
            vars(holder)[name] = value


def _holders(model: PreTrainedModel) -> list[Any]:
    """Return everything that may hold a limit: modules and their configs."""
    modules = list(model.modules())
    configs: list[Any] = [module.config for module in modules if hasattr(module, "config")]
    configs += [config.get_text_config() for config in configs if hasattr(config, "get_text_config")]
    return [*modules, *{id(config): config for config in configs}.values()]


def _limits_of(holder: Any) -> list[tuple[str, int]]:
    return [
        (name, value)
        for name, value in vars(holder).items()
        if type(value) is int and any(word in name for word in _LIMITS)
    ]


def _judge(
    model: PreTrainedModel, rows: Sequence[Sequence[int]], plain_TD: Tensor
) -> Callable[[Tensor], bool]:
    """Return a predicate: whether rounding explains how given hidden states differ from the first plain ones."""
    noise_T = None
    if not is_exact(model.dtype):
        with plain_attention(model), nudged_embeddings(model):
            noise_T = errors_T(torch.cat([plain_hidden_states(model, row) for row in rows]), plain_TD)
    allowed = TOLERANCES[model.dtype].hidden
    return lambda found_TD: (
        first_beyond(errors_T(found_TD, plain_TD[: len(found_TD)]), allowed, noise_T) is None
    )


def _expect_causal(
    model: PreTrainedModel, rows: list[list[int]], plain_TD: Tensor, within: Callable[[Tensor], bool]
) -> None:
    """Raise ModelError if other tokens, or none, at the end of a row change the hidden states before it."""
    row = rows[0]
    kept = len(row) * 3 // 4
    others = [[*row[:kept], *reversed(row[kept:])]]
    if not depends_on_length(model):  # else a shorter row is read in another way
        others.append(row[:kept])
    with plain_attention(model):
        found = [plain_hidden_states(model, other) for other in others]
    if not all(within(found_TD[:kept]) for found_TD in found):
        raise ModelError(
            f"{type(model).__name__} is not supported: it reads ahead (what follows in a text changes what it says of "
            "the tokens before)",
            hint="take a causal language model, which reads from left to right",
        )


def _difference(
    way: ReadingWay,
    model: PreTrainedModel,
    rows: list[list[int]],
    plain_TD: Tensor,
    within: Callable[[Tensor], bool],
) -> str | None:
    """Return what keeps the model from reading rows in this way, or None."""
    batch = pack(rows, [[False] * len(row) for row in rows]).to(computing_device(model))
    try:
        found_TD = read_by(way, model, batch)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # any class may break in its own way
        return _first_line(error)
    if within(found_TD):
        return None
    worst = float(errors_T(found_TD, plain_TD).max())
    return f"its hidden states differ by {worst:.0%} from those of each text alone"


def _first_line(error: Exception) -> str:
    text = " ".join(str(error).strip().partition("\n")[0].split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
