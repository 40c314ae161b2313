"""The roles of PPO and what each of them answers.

Responsible for: holding actor, reference, critic and scorer, and their no-grad forwards over a packed batch.
Not responsible for: gradients (rlhf/update.py), sampling (engine/), building models from names (rlhf/build.py).

Shapes: T packed tokens, S sequences.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dovetail.batches import PackedBatch
from dovetail.engine.hybrid import HybridEngine
from dovetail.engine.parity import check_training_parity
from dovetail.model.forward import (
    LogProbs,
    context_in,
    context_of,
    plain_model,
    token_logprobs,
    token_values,
    vocabulary_of,
)
from dovetail.model.lora import adapter_disabled
from dovetail.model.rope import rope_limit_in
from dovetail.parallel.shard import sharding_of
from dovetail.parallel.world import ALONE, World, parts_of
from dovetail.rlhf.algorithms.ppo import Ppo
from dovetail.rlhf.algorithms.protocol import Algorithm
from dovetail.rlhf.environments import Environments
from dovetail.rlhf.rewards import Scorer, expect_readable
from dovetail.text.chat_format import ChatFormat
from dovetail.training.step import TokenBudget, retry_on_out_of_memory

BatchT = TypeVar("BatchT", bound=PackedBatch)


@dataclass(slots=True, kw_only=True)
class Roles:
    """The models of PPO by role. With LoRA the reference is the actor with its adapters off: no second model."""

    actor: PreTrainedModel
    critic: PreTrainedModel | None
    """None where the algorithm has none."""
    reference: PreTrainedModel | None
    """A frozen copy of the actor; None = the actor without its adapters."""
    score: Scorer
    chat: ChatFormat
    engine: HybridEngine
    """Generates with the actor's own parameters."""
    device: torch.device
    budget: TokenBudget
    """Tokens of one forward pass, shared by scoring and training so that both pack alike."""
    algorithm: Algorithm = field(default_factory=Ppo)
    """The method that turns scores into advantages and a loss."""
    environments: Environments | None = None
    """The environments that the actor talks to; None = it answers each prompt once."""
    reward_model: PreTrainedModel | None = None
    """The model behind `score`, if there is one."""
    score_clip: float | None = None
    """The limit of the scores, either way; None where a function gives them or adds to them."""
    value_offset: float = 0.0
    """A constant added to the critic's head, whose transformers class has no bias (rlhf/update.py)."""

    def actor_logprobs(self, batch: PackedBatch, *, temperature: float) -> LogProbs:
        """float32 [T] log-probabilities and entropies of the marked tokens under the actor as it is now."""
        return policy_logprobs(self.actor, batch, self.budget, temperature=temperature)

    def reference_logprobs(self, batch: PackedBatch, *, temperature: float) -> Tensor:
        """float32 [T] log-probabilities of the marked tokens under the reference."""
        with self._reference() as model:
            return _in_parts(
                model,
                batch,
                lambda part: (token_logprobs(model, part, temperature=temperature).logprobs_T,),
                self.budget,
            )[0]

    def values(self, batch: PackedBatch) -> Tensor:
        """float32 [T] critic's value of the state in which each token was chosen."""
        return _in_parts(self.held_critic, batch, lambda part: (self.values_of(part),), self.budget)[0]

    def values_of(self, micro: PackedBatch) -> Tensor:
        """Return the same for one micro-batch, differentiable."""
        return token_values(self.held_critic, micro) + self.value_offset

    @property
    def held_critic(self) -> PreTrainedModel:
        """Return the critic. Raises ValueError if the algorithm has none."""
        if self.critic is None:
            raise ValueError(f"{self.algorithm} has no critic, so there are no values")
        return self.critic

    @property
    def context(self) -> int | None:
        """The most tokens that the actor, and the critic if there is one, can read; None = they have no limit."""
        models = [plain_model(model) for model in (self.actor, self.critic) if model is not None]
        limits = [limit(model.config) for model in models for limit in (context_in, rope_limit_in)]
        return min((limit for limit in limits if limit is not None), default=None)

    def expect_readable(self, batch: PackedBatch) -> None:
        """Raise ModelError if the critic cannot read a batch of the actor's answers that is still on the host."""
        if self.critic is None:
            return
        highest_id = int(batch.token_ids_T.max())
        expect_readable("critic", self.critic, longest=batch.max_length, highest_id=highest_id)

    def check_readers(self, sequences: Sequence[Sequence[int]], reach: int) -> None:
        """Compare each model that reads answers with its plain forward, on a few sequences and one of `reach` tokens.

        Raises ParityError on a difference that rounding cannot explain.
        """
        for model in (self.critic, self.reference, self.reward_model):
            if model is None:
                continue
            rows, context = vocabulary_of(plain_model(model)), context_of(plain_model(model))
            known = [[token_id % rows for token_id in ids][:context] for ids in sequences]
            longest = (known[-1] * (reach // len(known[-1]) + 1))[: min(reach, context or reach)]
            check_training_parity(model, known[:-1], longest=longest)
            sharding_of(model).reshard()

    @contextmanager
    def _reference(self) -> Iterator[PreTrainedModel]:
        frozen = self.reference
        with nullcontext() if frozen is not None else adapter_disabled(self.actor):
            yield frozen if frozen is not None else self.actor


def policy_logprobs(
    model: PreTrainedModel, batch: PackedBatch, budget: TokenBudget, *, temperature: float
) -> LogProbs:
    """float32 [T] log-probabilities and entropies of the marked tokens, without gradient, in parts that fit."""

    def forward(part: PackedBatch) -> tuple[Tensor, Tensor]:
        found = token_logprobs(model, part, temperature=temperature, with_entropy=True)
        assert found.entropy_T is not None
        return found.logprobs_T, found.entropy_T

    logprobs_T, entropy_T = _in_parts(model, batch, forward, budget)
    return LogProbs(logprobs_T=logprobs_T, entropy_T=entropy_T)


@torch.no_grad()
def _in_parts(
    model: PreTrainedModel,
    batch: PackedBatch,
    forward: Callable[[PackedBatch], Sequence[Tensor]],
    budget: TokenBudget,
) -> list[Tensor]:
    """Run `forward` as `over_tokens` does, in smaller parts where the device has no room."""
    columns = retry_on_out_of_memory(
        lambda: over_tokens(batch, forward, budget.tokens, sharding_of(model).world),
        budget,
        unit_tokens=lambda: batch.lengths,
    )
    sharding_of(model).reshard()
    return columns


def over_tokens(
    batch: PackedBatch,
    forward: Callable[[PackedBatch], Sequence[Tensor]],
    max_tokens: int,
    world: World = ALONE,
) -> list[Tensor]:
    """Run `forward` over micro-batches and lay its [T] columns back in the order of `batch`.

    Each process of `world` runs it over its share of the sequences; all get all columns.
    """
    if batch.num_tokens <= max_tokens and world.size == 1:
        return list(forward(batch))
    columns: list[Tensor] = []
    runs = batch.runs(max_tokens)
    for part in parts_of([run.tokens for run in runs], max_tokens, world):
        index = [unit for i in part.index for unit in runs[i].units]
        found = forward(batch.sequences(index))
        if not columns:
            columns = [torch.zeros(batch.num_tokens, dtype=c.dtype, device=c.device) for c in found]
        if part.counts:
            index_T = batch.token_index_T(index)
            for column, values in zip(columns, found, strict=True):
                column[index_T] = values
    return [world.sum(column) for column in columns]
