"""Forward passes over packed batches: hidden states, log-probabilities, values, scores.

Responsible for: the way a model reads the sequences of a batch (packed, padded, or each alone), calling its backbone
and reading what each role needs off its hidden states, and evaluation mode for a while.
Not responsible for: finding by trial how a model reads (probe.py), attention itself (attention.py), the fused head
(linear_logprobs.py), losses (maths/).

A model here is a causal language model, or a scalar model (`...ForSequenceClassification` with one label: reward models
and critics), plain or peft-wrapped.

Shapes: T packed tokens, S sequences, A tokens whose mask is True, L longest sequence, D width; U tokens that are
computed, N rows.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import linear, pad
from transformers import PreTrainedModel

from dovetail.batches import PackedBatch, SummedLoss
from dovetail.errors import ModelError
from dovetail.maths.masked import sums_of_sequences
from dovetail.model.attention import Layout, PackedLayout, has_attention_switch, use_packed_attention
from dovetail.model.linear_logprobs import head_of, linear_cross_entropy, linear_logprobs
from dovetail.model.plain_forward import plain_hidden_states, use_plain_attention
from dovetail.model.rope import rope_limit, unknown_rope
from dovetail.model.shared_prompts import SharedPromptLayout, taken


@contextmanager
def evaluation_mode(model: Any) -> Iterator[None]:
    """Switch dropout off within the block; afterwards, also on an error, every module is in its mode from before."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, was_training in training.items():
            module.training = was_training


# Layers of any other kind (state spaces, convolutions, chunked attention) would mix the packed sequences.
_PACKABLE_LAYERS = frozenset({"full_attention", "sliding_attention", "attention"})

ReadingWay = Literal["packed", "padded", "alone"]


@dataclass(frozen=True, slots=True)
class Reading:
    """The way a model reads the sequences of a batch."""

    way: ReadingWay
    reason: str | None = None
    """The reason why it is not packed."""


def is_probed(model: PreTrainedModel) -> bool:
    """Return whether the way it reads was found by trying (probe.py)."""
    return hasattr(model.base_model, "dovetail_reading")


def reading_of(model: PreTrainedModel) -> Reading:
    """Return what the probe of the model has found; without a probe, what its class declares."""
    backbone: Any = model.base_model
    found: Reading | None = getattr(backbone, "dovetail_reading", None)
    if found is None:
        obstacle = packing_obstacle(model)
        found = Reading("packed") if obstacle is None else Reading("padded", obstacle)
    return found


def remember_reading(model: PreTrainedModel, reading: Reading) -> None:
    """Let the model, its copies and all that is built on its backbone read in this way."""
    backbone: Any = model.base_model
    backbone.dovetail_reading = reading


def why_not_packed(model: PreTrainedModel) -> str | None:
    """Return why a model does not run over packed batches, None if it does."""
    return reading_of(model).reason


def packing_obstacle(model: PreTrainedModel) -> str | None:
    """Return what a class declares that rules packed batches out, or None."""
    name = type(model).__name__
    if not has_attention_switch(model):
        return f"{name} keeps its own attention (it bypasses the attention registry)"
    if getattr(model, "_is_stateful", False):
        return f"{name} carries a state from token to token, which would leak between packed sequences"
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    if not kinds <= _PACKABLE_LAYERS:
        return f"{name} has layers that mix packed sequences: {', '.join(sorted(kinds - _PACKABLE_LAYERS))}"
    if any(name.rpartition(".")[2] == "sinks" for name, _ in model.named_parameters()):
        return f"{name} has attention sinks"
    if (rope := unknown_rope(model)) is not None:
        return (
            f"{name} has a rope ({rope}) whose frequencies depend on the length read, in a class of its own"
        )
    return None


TensorsT = TypeVar("TensorsT", bound="Tensor | tuple[Tensor | None, ...]")


@dataclass(frozen=True, slots=True)
class LogProbs:
    """The log-probabilities that a policy gives to the tokens of a batch; 0 where the batch's mask is False."""

    logprobs_T: Tensor
    """float32 [T] (float64 for float64 models), differentiable."""
    entropy_T: Tensor | None
    """[T], nats, of the distribution each token was drawn from; without gradient. None if not asked for."""


def hidden_states(model: Any, batch: PackedBatch) -> Tensor:
    """Return the backbone's output [T, D], no head applied. Row t has seen its sequence up to and with token t."""
    return with_weights(model, lambda: _read(model, batch).whole())


def with_weights(model: Any, function: Callable[[], TensorsT]) -> TensorsT:
    """Return the result of a function that reads the model's weights, backbone and head.

    A model whose weights are sharded (parallel/shard.py) unshards them around the call, and puts hooks on the tensors
    that come out for the backward pass; for other models the function just runs.
    """
    run = getattr(plain_model(model), "run_with_weights", None)
    result: TensorsT = function() if run is None else run(function)
    return result


@dataclass(frozen=True, slots=True)
class _HiddenStates:
    """The states that a backbone computed for a batch, and the place of each token's state among them."""

    computed_UD: Tensor
    row_T: Tensor | None = None
    """int64 [T]; None = each token has a state of its own, in order."""

    def at(self, index_N: Tensor) -> Tensor:
        """Return the states [N, D] of the given tokens."""
        if self.row_T is None:
            return self.computed_UD.index_select(0, index_N)
        return taken(self.computed_UD, self.row_T.index_select(0, index_N))

    def whole(self) -> Tensor:
        """Return the states of all tokens, [T, D]."""
        return self.expand(self.computed_UD)

    def expand(self, x_U: Tensor) -> Tensor:
        """Return [T, ...]: what was computed from each token's state."""
        return x_U if self.row_T is None else taken(x_U, self.row_T)


def can_share_prompts(model: PreTrainedModel, batch: PackedBatch) -> bool:
    """Return whether a model that reads packed batches computes the shared prompts of this batch once.

    A rope whose frequencies depend on the length gives a prompt other numbers for each length of the answer.
    """
    if not any(batch.shared_lengths):
        return False
    limit = rope_limit(model.base_model)
    return limit is None or batch.max_length <= limit


def _read(model: Any, batch: PackedBatch) -> _HiddenStates:
    inner = plain_model(model)
    reading = reading_of(inner)
    if reading.way == "packed" and can_share_prompts(inner, batch):
        return _read_prompts_once(inner, batch)
    if reading.way == "padded":
        _warn_of_padding(f"{reading.reason}: its batches are padded, which is slower")
    if reading.way == "alone":
        _warn_of_padding(f"{reading.reason}: it reads one text at a time, which is much slower")
        if hasattr(inner, "run_with_weights"):
            raise ModelError(
                f"{reading.reason}: it reads one text at a time, which processes that share its weights cannot do",
                hint="set zero_stage=0, or train in one process",
            )
    return _HiddenStates(read_by(reading.way, inner, batch))


def read_by(way: ReadingWay, model: PreTrainedModel, batch: PackedBatch) -> Tensor:
    """Return the `hidden_states` [T, D] of a plain model whose weights are not sharded now, read in this way."""
    if way == "packed":
        return _packed_hidden_states(model, batch)
    use_plain_attention(model)
    if way == "padded":
        return _padded_hidden_states(model.base_model, batch)
    rows = torch.split_with_sizes(batch.token_ids_T, batch.lengths)
    return torch.cat([plain_hidden_states(model, ids) for ids in rows])


def _packed_hidden_states(model: PreTrainedModel, batch: PackedBatch) -> Tensor:
    return _laid_out(model, batch.token_ids_T, batch.position_ids_T(), PackedLayout.of(batch))


def _read_prompts_once(model: PreTrainedModel, batch: PackedBatch) -> _HiddenStates:
    layout = SharedPromptLayout(batch)
    token_ids_U = batch.token_ids_T.index_select(0, layout.kept_U)
    positions_U = batch.position_ids_T().index_select(0, layout.kept_U)
    return _HiddenStates(_laid_out(model, token_ids_U, positions_U, layout), layout.row_T)


def _laid_out(model: PreTrainedModel, token_ids_U: Tensor, positions_U: Tensor, layout: Layout) -> Tensor:
    """Return the states [U, D] of tokens that lie as `layout` says."""
    use_packed_attention(model)
    output = model.base_model(
        input_ids=token_ids_U[None],
        position_ids=positions_U[None],
        # transformers hands a mask of four dimensions through unread. Without one, its classes look for
        # packed sequences in the positions themselves, which waits for the device in every forward.
        attention_mask=torch.zeros(1, 1, 1, 1, device=token_ids_U.device),
        use_cache=False,
        layout=layout,
    )
    hidden_UD: Tensor = output.last_hidden_state.squeeze(0)
    return hidden_UD


def token_logprobs(
    model: Any, batch: PackedBatch, *, temperature: float = 1.0, with_entropy: bool = False
) -> LogProbs:
    """Return log p(token t | its sequence before it) where `mask_T` is True, logits divided by `temperature`."""
    index_A = masked_index(batch)

    def score() -> tuple[Tensor, Tensor | None]:
        # Token t was chosen by the state that had seen everything up to t - 1.
        return linear_logprobs(
            _read(model, batch).at(index_A - 1),
            head_of(model),
            batch.token_ids_T[index_A],
            temperature=temperature,
            with_entropy=with_entropy,
        )

    logprobs_A, entropy_A = with_weights(model, score)
    zeros_T = logprobs_A.new_zeros(batch.num_tokens)
    return LogProbs(
        logprobs_T=zeros_T.index_copy(0, index_A, logprobs_A),
        entropy_T=None if entropy_A is None else zeros_T.index_copy(0, index_A, entropy_A),
    )


def sequence_logprobs(model: Any, batch: PackedBatch) -> Tensor:
    """Return [S]: for each sequence, the sum of log p(token | its sequence before it) where `mask_T` is True."""
    return sums_of_sequences(token_logprobs(model, batch).logprobs_T, batch.mask_T, batch.cu_seqlens_S1)


def cross_entropy(model: Any, batch: PackedBatch) -> Tensor:
    """Return - sum of log p(token | its sequence before it) where `mask_T` is True.

    A scalar, float32 (float64 for float64 models).
    """
    index_A = masked_index(batch)
    return with_weights(
        model,
        lambda: linear_cross_entropy(
            _read(model, batch).at(index_A - 1),
            head_of(model),
            batch.token_ids_T[index_A],
        ),
    )


def language_model_loss(model: PreTrainedModel, micro: PackedBatch) -> SummedLoss:
    """Cross-entropy of the marked tokens: supervised fine-tuning's loss, and mixture training's."""
    return SummedLoss(cross_entropy(model, micro), micro.mask_T.sum())


def token_values(model: Any, batch: PackedBatch) -> Tensor:
    """Return [T], float32: the value of the state in which token t was chosen; 0 for first tokens, never chosen."""

    def score() -> Tensor:
        found = _read(model, batch)
        return found.expand(_scalar_head(model, found.computed_UD))

    scores_T = with_weights(model, score).squeeze(-1)
    values_T = pad(scores_T[:-1], (1, 0))
    return values_T.index_fill(0, batch.cu_seqlens_S1[:-1].long(), 0.0)


def last_scores(model: Any, batch: PackedBatch) -> Tensor:
    """Return [S], float32: the scalar head at each sequence's last token, as `...ForSequenceClassification` does."""
    last_S = batch.last_index_S()
    return with_weights(model, lambda: _scalar_head(model, _read(model, batch).at(last_S))).squeeze(-1)


def last_hidden_states(model: Any, batch: PackedBatch) -> Tensor:
    """Return the hidden state of each sequence's last token, [S, D]."""
    return with_weights(model, lambda: _read(model, batch).at(batch.last_index_S()))


def scalar_head(model: Any, hidden_ND: Tensor) -> Tensor:
    """Return one number per hidden state, [N], float32 at least."""
    return with_weights(model, lambda: _scalar_head(model, hidden_ND)).squeeze(-1)


def _scalar_head(model: Any, hidden_ND: Tensor) -> Tensor:
    """Return [N, 1], not a view: FSDP2 puts hooks on what comes out of a model, and could lose those of a view."""
    score = getattr(plain_model(model), "score", None)
    if score is None or score.weight.shape[0] != 1:
        raise ModelError(
            f"{type(plain_model(model)).__name__} has no head with one score",
            hint="load it with dovetail.model.load.load_scalar_model",
        )
    float_type = torch.promote_types(hidden_ND.dtype, torch.float32)
    bias = None if score.bias is None else score.bias.to(float_type)
    scores_N1: Tensor = linear(hidden_ND.to(float_type), score.weight.to(float_type), bias)
    return scores_N1


def vocabulary_of(model: PreTrainedModel) -> int:
    """Return how many token ids the model can read."""
    return int(model.get_input_embeddings().num_embeddings)  # type: ignore[arg-type]


def context_of(model: PreTrainedModel) -> int | None:
    """Return the longest sequence the model can read, None where its config names no limit."""
    return context_in(model.config)


def context_in(config: Any) -> int | None:
    """Return `context_of` a model with this config."""
    text = config.get_text_config()
    limits = [getattr(text, name, None) for name in ("max_position_embeddings", "max_seq_len")]
    return next((int(limit) for limit in limits if limit), None)


def plain_model(model: Any) -> PreTrainedModel:
    """Return the Hugging Face model inside a peft wrapper (its adapters stay in place), or the model itself."""
    inner: PreTrainedModel = model.get_base_model() if hasattr(model, "get_base_model") else model
    return inner


def masked_index(batch: PackedBatch) -> Tensor:
    """Return where `mask_T` is True, int64 [A]. The host knows their number, so it does not wait for the device."""
    return torch.nonzero_static(batch.mask_T, size=sum(batch.target_counts)).squeeze(-1)


def _padded_hidden_states(backbone: Any, batch: PackedBatch) -> Tensor:
    """Read a batch with the class's own attention, padded on the right, so that default positions are right."""
    token_of_place, place_of_token = PackedLayout.of(batch).padding_indices
    shape = (batch.num_sequences, batch.max_length)
    is_real = torch.zeros(shape[0] * shape[1], dtype=torch.long, device=token_of_place.device)
    output = backbone(
        input_ids=batch.token_ids_T[token_of_place].view(shape),
        attention_mask=is_real.index_fill(0, place_of_token, 1).view(shape),
        use_cache=False,
    )
    hidden_TD: Tensor = output.last_hidden_state.flatten(0, 1).index_select(0, place_of_token)
    return hidden_TD


@cache
def _warn_of_padding(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=4)
