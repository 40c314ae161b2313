"""Every record on the training path: packed, never padded.

Responsible for: what crosses function boundaries between sampling, scoring and learning, with shapes, and how
such a record is packed, moved and cut into micro-batches.
Not responsible for: what the numbers mean (maths/), or where they come from (rlhf/, data/).

Shapes: T packed tokens (all sequences end to end), S sequences, A action tokens, P preference pairs.

Every per-token column is aligned with the token it speaks of: `logprobs_T[t]` is the log-probability of token t
given those before it in its sequence, `values_T[t]` the value of the state in which token t was chosen. The
first token of a sequence has no such number; its entry is 0 and its mask is False.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

PackedT = TypeVar("PackedT", bound="PackedBatch")


@dataclass(frozen=True, slots=True)
class Run:
    """Units of a batch, in a row, that share a micro-batch."""

    units: list[int]
    tokens: int
    """The tokens that a model computes for them."""


def single_runs(unit_tokens: Sequence[int]) -> list[Run]:
    """Return a run for each unit alone."""
    return [Run([unit], tokens) for unit, tokens in enumerate(unit_tokens)]


@dataclass(frozen=True, slots=True)
class SummedLoss:
    """A loss not yet normalised: one place divides by the global count (training/step.py)."""

    total: Tensor
    """Scalar, differentiable: the sum over the counted tokens or pairs."""
    count: Tensor
    """Scalar: how many tokens, pairs or sequences `total` sums over."""
    stats: Mapping[str, Tensor] = field(default_factory=dict)
    """Other sums over the same tokens, by name, to be reported divided by the same count."""
    maxima: Mapping[str, Tensor] = field(default_factory=dict)
    """Largest values over the same tokens, by name."""


class MicroBatchable(Protocol):
    """A batch that gradient accumulation can cut."""

    @property
    def num_targets(self) -> float:
        """The number that the summed loss is divided by: action tokens, pairs, ...; known before the forward pass."""
        ...

    @property
    def num_tokens(self) -> int:
        """Tokens of the whole batch."""
        ...

    @property
    def unit_tokens(self) -> Sequence[int]:
        """Tokens of each unit that cannot be cut: a sequence, or a group of ranked answers."""
        ...

    @property
    def unit_targets(self) -> Sequence[float]:
        """Targets of each unit; they add up to `num_targets`."""
        ...

    def units(self, index: Sequence[int]) -> Any:
        """Return the record of the given units alone."""
        ...

    def runs(self, max_tokens: int) -> list[Run]:
        """Return all units in runs of at most `max_tokens` tokens (a single longer unit is a run of its own)."""
        ...

    def micro_batches(self, max_tokens: int) -> list[Any]:
        """Cut into parts of at most `max_tokens` tokens (a single longer unit stays whole)."""
        ...

    def to(self, device: torch.device) -> Any:
        """Return the same record on another device."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedBatch:
    """Sequences end to end, with the tokens that count marked."""

    token_ids_T: Tensor
    """int64 [T]."""
    cu_seqlens_S1: Tensor
    """int32 [S + 1]: sequence s is token_ids_T[cu_seqlens_S1[s]:cu_seqlens_S1[s + 1]]."""
    lengths: tuple[int, ...]
    """The same lengths on the host, so that nothing waits for the device to learn a shape."""
    mask_T: Tensor
    """bool [T]: True = a token the loss counts (an assistant token, an action)."""
    target_counts: tuple[int, ...]
    """The number of True tokens of `mask_T` in each sequence, on the host for the same reason."""
    shared_lengths: tuple[int, ...] = ()
    """The number of first tokens of each sequence that models compute with the sequence before it, which begins with
    the same ones; 0 = none, as for the first sequence of a group; empty = none in the whole batch."""

    def __post_init__(self) -> None:
        expect_same_length(self)
        if self.shared_lengths:
            _expect_groups(self.shared_lengths, self.lengths)
        if (
            not len(self.lengths) == len(self.target_counts) == self.cu_seqlens_S1.numel() - 1
            or sum(self.lengths) != self.token_ids_T.numel()
        ):
            raise ValueError("lengths, target_counts, cu_seqlens_S1 and token_ids_T contradict each other")

    @property
    def num_targets(self) -> float:
        return float(sum(self.target_counts))

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    @property
    def num_sequences(self) -> int:
        return len(self.lengths)

    @property
    def unit_tokens(self) -> Sequence[int]:
        return self.lengths

    @property
    def unit_targets(self) -> Sequence[float]:
        return self.target_counts

    @property
    def max_length(self) -> int:
        return max(self.lengths)

    @property
    def own_lengths(self) -> tuple[int, ...]:
        """The tokens that a model computes for each sequence: all that it does not share with the one before it."""
        if not self.shared_lengths:
            return self.lengths
        return tuple(a - b for a, b in zip(self.lengths, self.shared_lengths, strict=True))

    def position_ids_T(self) -> Tensor:
        """int64 [T]: 0, 1, 2, ... restarting with each sequence."""
        lengths_S = (self.cu_seqlens_S1[1:] - self.cu_seqlens_S1[:-1]).long()
        starts_T = self.cu_seqlens_S1[:-1].long().repeat_interleave(lengths_S, output_size=self.num_tokens)
        return torch.arange(self.num_tokens, device=self.token_ids_T.device) - starts_T

    def last_index_S(self) -> Tensor:
        """int64 [S]: the index in T of each sequence's last token."""
        return self.cu_seqlens_S1[1:].long() - 1

    def to(self: PackedT, device: torch.device) -> PackedT:
        columns: dict[str, Any] = {name: moved(column, device) for name, column in tensors_of(self)}
        return replace(self, **columns)

    def token_index_T(self, index: Sequence[int]) -> Tensor:
        """int64: where the tokens of the given sequences lie in this batch's T, in that order."""
        return moved(self._token_index_T(index), self.token_ids_T.device)

    def _token_index_T(self, index: Sequence[int]) -> Tensor:
        """Return the same on the host."""
        starts = cumulative(self.lengths)
        picked = [torch.arange(starts[i], starts[i + 1]) for i in index]
        return torch.cat(picked) if picked else torch.zeros(0, dtype=torch.long)

    def sequences(self: PackedT, index: Sequence[int]) -> PackedT:
        """Return the given sequences, in that order. Nothing else re-packs."""
        lengths = tuple(self.lengths[i] for i in index)
        # Made on the host, from what the host knows, and sent in one piece: nothing waits for the device.
        pieces = [self._token_index_T(index), torch.tensor(list(index)), torch.tensor(cumulative(lengths))]
        sizes = [len(piece) for piece in pieces]
        together = moved(torch.cat([piece.long() for piece in pieces]), self.token_ids_T.device)
        index_T, index_S, bounds_S1 = together.split_with_sizes(sizes)
        columns: dict[str, Any] = {}
        for name, column in tensors_of(self):
            if name.endswith("_T"):
                columns[name] = column[index_T]
            elif name.endswith("_S"):
                columns[name] = column[index_S]
        columns["cu_seqlens_S1"] = bounds_S1.int()
        counts = tuple(self.target_counts[i] for i in index)
        shared = self._shared_among(index)
        return replace(self, lengths=lengths, target_counts=counts, shared_lengths=shared, **columns)

    def _shared_among(self, index: Sequence[int]) -> tuple[int, ...]:
        """Return the `shared_lengths` of the given sequences: neighbours of one group still share its prompt."""
        if not self.shared_lengths:
            return ()
        groups = list(itertools.accumulate(int(shared == 0) for shared in self.shared_lengths))
        prompts = dict(zip(groups, self.shared_lengths, strict=True))  # the last of a group knows its prompt
        found = [0, *(prompts[groups[b]] * (groups[a] == groups[b]) for a, b in itertools.pairwise(index))]
        return tuple(found[: len(index)]) if any(found) else ()

    def units(self: PackedT, index: Sequence[int]) -> PackedT:
        return self.sequences(index)

    def runs(self, max_tokens: int) -> list[Run]:
        """Keep the sequences of a group together; a group of more than `max_tokens` is cut, and repeats its prompt."""
        runs: list[Run] = []
        for unit, (length, own) in enumerate(zip(self.lengths, self.own_lengths, strict=True)):
            if own < length and runs[-1].tokens + own <= max_tokens:
                runs[-1] = Run([*runs[-1].units, unit], runs[-1].tokens + own)
            else:
                runs.append(Run([unit], length))
        return runs

    def micro_batches(self: PackedT, max_tokens: int) -> list[PackedT]:
        """Parts of at most `max_tokens` tokens, balanced; a unit longer than that is a part of its own."""
        runs = self.runs(max_tokens)
        parts = balanced_parts([run.tokens for run in runs], max_tokens)
        return [self.units([unit for i in part for unit in runs[i].units]) for part in parts]


@dataclass(frozen=True, slots=True)
class Groups:
    """A packed batch of which so many units in a row are never cut apart, such as the two answers of a pair."""

    batch: PackedBatch
    size: int
    """Units of the batch (sequences; prompts of a RankedBatch) in each group."""

    def __post_init__(self) -> None:
        num_units = len(self.batch.unit_tokens)
        if self.size < 1 or num_units % self.size:
            raise ValueError(f"a batch of {num_units} sequences does not divide into groups of {self.size}")

    @property
    def num_targets(self) -> float:
        return self.batch.num_targets

    @property
    def num_tokens(self) -> int:
        return self.batch.num_tokens

    @property
    def unit_tokens(self) -> Sequence[int]:
        return self._sums(self.batch.unit_tokens)

    @property
    def unit_targets(self) -> Sequence[float]:
        return self._sums(self.batch.unit_targets)

    def _sums(self, values: Sequence[Any]) -> list[Any]:
        return [sum(values[i : i + self.size]) for i in range(0, len(values), self.size)]

    def units(self, index: Sequence[int]) -> Groups:
        """Return the given groups, in that order."""
        kept = [self.size * group + i for group in index for i in range(self.size)]
        return Groups(self.batch.units(kept), self.size)

    def runs(self, max_tokens: int) -> list[Run]:
        return single_runs(self.unit_tokens)

    def micro_batches(self, max_tokens: int) -> list[Groups]:
        """Parts of at most `max_tokens` tokens, balanced; a group longer than that is a part of its own."""
        return [self.units(index) for index in balanced_parts(self.unit_tokens, max_tokens)]

    def to(self, device: torch.device) -> Groups:
        return Groups(self.batch.to(device), self.size)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout(PackedBatch):
    """Prompts with the answers the actor sampled for them; `mask_T` marks the sampled tokens (the actions)."""

    sampled_logprobs_T: Tensor
    """float32 [T]: log-probability of each action under the generator, at the sampling temperature."""
    finished_S: Tensor
    """bool [S]: True = the answer ended with a stop token; False = it was cut off by the length limit."""
    turn_rewards_T: Tensor | None = None
    """float32 [T]: what an environment paid for each turn, at its last token; a part of the answer's score."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Experience(PackedBatch):
    """One PPO iteration's sampled and scored answers; `mask_T` marks the actions."""

    sampled_logprobs_T: Tensor
    """float32 [T]: under the generator that drew the actions, temperature applied."""
    old_logprobs_T: Tensor | None
    """float32 [T]: under the actor before the update by the training forward, temperature applied. None = by the
    forward of the one step that will be taken on this rollout, which begins there."""
    reference_logprobs_T: Tensor
    """float32 [T]: under the frozen reference, temperature applied."""
    old_values_T: Tensor | None
    """float32 [T]: the critic's, at sampling time, for the clipped value loss and explained variance. None without a
    critic."""
    rewards_T: Tensor
    """float32 [T]: per-token reward, KL penalty included, score on the last action."""
    advantages_T: Tensor
    """float32 [T]: as the algorithm gives them; PPO's are normalised over the actions of the whole batch."""
    returns_T: Tensor | None
    """float32 [T]: target of the critic: advantages before normalisation + old values. None without a critic."""
    scores_S: Tensor
    """float32 [S]: what the reward model or function said of each answer, before clipping and penalties."""
    finished_S: Tensor
    """bool [S]: False = the answer was cut off by the length limit."""
    weights_T: Tensor | None = None
    """float32 [T]: the weight of each action in the loss of its minibatch; None = all 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankedBatch(PackedBatch):
    """Answers to prompts with the preference pairs among them; one group = all answers to one prompt.

    `mask_T` is True on the last token of each answer, where its score is read.
    """

    group_sizes: tuple[int, ...]
    """Answers of each prompt, in order: sequences g_0, then g_1, ... ; sums to S."""
    is_ranked: tuple[bool, ...]
    """True if there are pairs among the answers of each prompt."""
    chosen_P: Tensor
    """int64 [P]: sequence index of the preferred answer."""
    rejected_P: Tensor
    """int64 [P]: sequence index of the other answer."""
    margin_P: Tensor
    """float32 [P]: how much better by the source's own account, 0 where it does not say."""
    weight_P: Tensor
    """float32 [P]: 1 / (pairs of the same prompt), so that each prompt counts once (InstructGPT, eq. 1)."""

    @property
    def num_targets(self) -> float:
        """Prompts with pairs: what their weights sum to."""
        return float(sum(self.is_ranked))

    @property
    def unit_tokens(self) -> Sequence[int]:
        """The tokens of all answers to each prompt."""
        starts = cumulative(self.group_sizes)
        return [sum(self.lengths[a:b]) for a, b in itertools.pairwise(starts)]

    def runs(self, max_tokens: int) -> list[Run]:
        return single_runs(self.unit_tokens)

    @property
    def unit_targets(self) -> Sequence[float]:
        return self.is_ranked

    def units(self, index: Sequence[int]) -> RankedBatch:
        return self.groups(index)

    def groups(self, index: Sequence[int]) -> RankedBatch:
        """Return the given prompts with all their answers and pairs."""
        starts = cumulative(self.group_sizes)
        kept = [s for g in index for s in range(starts[g], starts[g + 1])]
        device = self.token_ids_T.device
        new_of_old_S = torch.full((self.num_sequences,), -1, dtype=torch.long, device=device)
        new_of_old_S[torch.tensor(kept, device=device)] = torch.arange(len(kept), device=device)
        inside_P = new_of_old_S[self.chosen_P] >= 0
        packed = replace(
            self,
            chosen_P=new_of_old_S[self.chosen_P[inside_P]],
            rejected_P=new_of_old_S[self.rejected_P[inside_P]],
            margin_P=self.margin_P[inside_P],
            weight_P=self.weight_P[inside_P],
            group_sizes=tuple(self.group_sizes[g] for g in index),
            is_ranked=tuple(self.is_ranked[g] for g in index),
        )
        return PackedBatch.sequences(packed, kept)


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferenceBatch(RankedBatch):
    """Ranked answers from which a policy learns directly; `mask_T` is True on the tokens of the answers."""

    reference_logprobs_S: Tensor | None
    """float32 [S]: log-probability of each answer under the reference; None = the loss has no reference."""
    kl: float
    """The estimate of KL(policy || reference) before the step, over the whole batch; 0 where the loss has none."""


def pack(sequences: Sequence[Sequence[int]], masks: Sequence[Sequence[bool]]) -> PackedBatch:
    """Lay token id lists end to end. `masks` marks the tokens the loss counts; first tokens never count."""
    lengths = tuple(len(ids) for ids in sequences)
    if not lengths or min(lengths) == 0:
        raise ValueError("cannot pack an empty batch or an empty sequence")
    counted = [[bool(m) and i > 0 for i, m in enumerate(row)] for row in masks]
    return PackedBatch(
        token_ids_T=torch.tensor([i for ids in sequences for i in ids], dtype=torch.long),
        cu_seqlens_S1=torch.tensor(cumulative(lengths), dtype=torch.int32),
        lengths=lengths,
        mask_T=torch.tensor([m for row in counted for m in row], dtype=torch.bool),
        target_counts=tuple(sum(row) for row in counted),
    )


def share_prompts(batch: PackedT, prompt_lengths: Sequence[int]) -> PackedT:
    """Let models compute a prompt once for neighbouring sequences that begin with the same one.

    prompt_lengths: of each sequence. Every column stays as it is, and so does every result, up to rounding: only
    `shared_lengths` is added. Call it where the batch is still on the host.
    """
    ids = batch.token_ids_T.tolist()
    starts = cumulative(batch.lengths)
    prompts = [ids[start : start + length] for start, length in zip(starts, prompt_lengths, strict=False)]
    goes_on = [len(prompt) < length for prompt, length in zip(prompts, batch.lengths, strict=True)]
    shared = [0] * batch.num_sequences
    for before, here in itertools.pairwise(range(batch.num_sequences)):
        if goes_on[before] and goes_on[here] and prompts[before] == prompts[here]:
            shared[here] = len(prompts[here])
    return replace(batch, shared_lengths=tuple(shared) if any(shared) else ())


def _expect_groups(shared_lengths: tuple[int, ...], lengths: tuple[int, ...]) -> None:
    """Raise ValueError unless each sequence has tokens after its prompt, and those of a group share one length."""
    if len(shared_lengths) != len(lengths) or shared_lengths[0]:
        raise ValueError(f"shared_lengths {shared_lengths} do not fit sequences of {lengths} tokens")
    for s, shared in enumerate(shared_lengths):
        before = shared_lengths[s - 1]
        if shared and (before not in (0, shared) or not 0 < shared < min(lengths[s - 1], lengths[s])):
            raise ValueError(
                f"sequence {s} of {lengths[s]} tokens cannot share {shared} with the one before it"
            )


def pack_ranked(
    groups: Sequence[Sequence[Sequence[int]]], pairs: Sequence[Sequence[tuple[int, int, float]]]
) -> RankedBatch:
    """Pack the answers (prompt included) of several prompts with their preference pairs.

    groups: for each prompt, the token ids of each answer. pairs: for each prompt, (better, worse, margin) with
    indices into its answers.
    """
    sequences = [ids for group in groups for ids in group]
    packed = pack(sequences, [[i == len(ids) - 1 for i in range(len(ids))] for ids in sequences])
    starts = cumulative([len(group) for group in groups])
    flat = [(starts[g] + a, starts[g] + b, m, 1 / len(own)) for g, own in enumerate(pairs) for a, b, m in own]
    return RankedBatch(
        **{column.name: getattr(packed, column.name) for column in fields(packed)},
        is_ranked=tuple(bool(own) for own in pairs),
        group_sizes=tuple(len(group) for group in groups),
        chosen_P=torch.tensor([p[0] for p in flat], dtype=torch.long),
        rejected_P=torch.tensor([p[1] for p in flat], dtype=torch.long),
        margin_P=torch.tensor([p[2] for p in flat], dtype=torch.float32),
        weight_P=torch.tensor([p[3] for p in flat], dtype=torch.float32),
    )


def pack_preferences(
    groups: Sequence[Sequence[Sequence[int]]],
    pairs: Sequence[Sequence[tuple[int, int, float]]],
    prompt_tokens: Sequence[int],
    *,
    reference_logprobs: Sequence[float] | None = None,
    kl: float = 0.0,
) -> PreferenceBatch:
    """Pack ranked answers as `pack_ranked` does, with the tokens behind each prompt marked.

    prompt_tokens: how many tokens each prompt has. reference_logprobs: one number per answer.
    """
    ranked = pack_ranked(groups, pairs)
    answers = pack(
        [ids for group in groups for ids in group],
        [
            [place >= prompt for place in range(len(ids))]
            for group, prompt in zip(groups, prompt_tokens, strict=True)
            for ids in group
        ],
    )
    columns: dict[str, Any] = {column.name: getattr(ranked, column.name) for column in fields(ranked)}
    columns |= {"mask_T": answers.mask_T, "target_counts": answers.target_counts}
    reference_S = (
        None if reference_logprobs is None else torch.tensor(reference_logprobs, dtype=torch.float32)
    )
    return PreferenceBatch(**columns, reference_logprobs_S=reference_S, kl=kl)


def balanced_parts(sizes: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Divide indices into parts whose sizes sum to at most `max_tokens`, as few and as even as greedy packing gives.

    Longest first into the least full part that still has room; every index occurs once, parts keep input order.
    """
    order = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    num_parts = max(1, -(-sum(sizes) // max_tokens))
    parts: list[list[int]] = [[] for _ in range(num_parts)]
    used = [0] * num_parts
    for i in order:
        target = min(range(len(parts)), key=used.__getitem__)
        if parts[target] and used[target] + sizes[i] > max_tokens:
            parts.append([])
            used.append(0)
            target = len(parts) - 1
        parts[target].append(i)
        used[target] += sizes[i]
    return [sorted(part) for part in parts if part]


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """Move the tensor to the device; from the host to a GPU through pinned memory, so that neither waits."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def cumulative(lengths: Sequence[int]) -> list[int]:
    """[0, l_0, l_0 + l_1, ...]."""
    out = [0]
    for length in lengths:
        out.append(out[-1] + length)
    return out


def tensors_of(record: Any) -> list[tuple[str, Tensor]]:
    """Return the tensor fields of a record, by name."""
    named = ((column.name, getattr(record, column.name)) for column in fields(record))
    return [(name, value) for name, value in named if isinstance(value, Tensor)]


def expect_same_length(record: Any) -> None:
    """Raise ValueError unless all columns that share a shape suffix (_T, _S, _P) have one length."""
    for suffix in ("_T", "_S", "_P"):
        lengths = {name: len(value) for name, value in tensors_of(record) if name.endswith(suffix)}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"columns of different length: {lengths}")
