"""Comparisons, which tell how good a reward model is.

Responsible for: the answers as a reward model reads them. Not responsible for: accuracy, length bias and calibration
(rlhf/evaluation.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from dovetail.batches import pack_ranked
from dovetail.data.records import Comparison, message
from dovetail.errors import DataError
from dovetail.model.forward import context_of, plain_model
from dovetail.rlhf.evaluation import reward_accuracy
from dovetail.telemetry.log import say
from dovetail.text.chat_format import ChatFormat
from dovetail.training.step import TokenBudget


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardModel:
    """A reward model with what reads its tokens."""

    model: PreTrainedModel
    chat: ChatFormat
    device: torch.device
    budget: TokenBudget


@dataclass(frozen=True, slots=True)
class Pairs:
    """Comparisons of answers to one prompt each."""

    label: str
    comparisons: Sequence[Comparison]

    def __len__(self) -> int:
        return len(self.comparisons)

    def __call__(self, reward_model: RewardModel) -> dict[str, float]:
        """Return what `reward_accuracy` measures, on the rows that fit into the model's context."""
        groups, pairs = [], []
        limit = context_of(plain_model(reward_model.model))
        for row in self.comparisons:
            turns = [[*row.messages, message("assistant", text)] for text in row.answers]
            ids = [own for own, _ in reward_model.chat.encode_conversations(turns)]
            if limit is None or max(map(len, ids)) <= limit:
                groups.append(ids)
                pairs.append(row.better_than)
        if len(groups) < len(self):
            say(f"{self.label}: {len(self) - len(groups)} of {len(self)} rows are longer than {limit} tokens")
        if not groups:
            raise DataError(
                f"{self.label}: every row is longer than the reward model's context of {limit} tokens",
                hint="give shorter rows, or a reward model with a longer context",
            )
        batch, budget = pack_ranked(groups, pairs), reward_model.budget
        found = reward_accuracy(reward_model.model, batch, budget.tokens, reward_model.device)
        return {"loss" if name == "held_out_loss" else name: value for name, value in found.items()}
