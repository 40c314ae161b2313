"""Plain text, which a model predicts token by token.

Responsible for: perplexity, and bits per byte, which models with different tokens can be compared by.
Not responsible for: the forward passes (rlhf/evaluation.py).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dovetail.batches import pack
from dovetail.model.forward import context_of, plain_model
from dovetail.rlhf.evaluation import language_model_quality
from dovetail.rlhf.tasks.subject import Subject

MOST_TOKENS = 2048
"""The longest piece that a text is read in; a piece knows nothing of the one before it."""


@dataclass(frozen=True, slots=True)
class Texts:
    """Perplexity of plain texts, each ended by the end-of-text token, which counts."""

    label: str
    texts: Sequence[str]

    def __len__(self) -> int:
        return len(self.texts)

    def __call__(self, subject: Subject) -> dict[str, float]:
        longest = min(context_of(plain_model(subject.model)) or MOST_TOKENS, MOST_TOKENS)
        pieces = [
            ids[start : start + longest]
            for ids in subject.chat.encode_texts(self.texts)
            for start in range(0, len(ids), longest)
        ]
        batch = pack(pieces, [[True] * len(ids) for ids in pieces])
        found = language_model_quality(subject.model, batch, subject.budget.tokens, subject.device)
        num_bytes = sum(len(text.encode()) for text in self.texts)
        nats = found["held_out_loss"] * batch.num_targets
        return {
            "perplexity": found["held_out_perplexity"],
            "nats_per_token": found["held_out_loss"],
            "bits_per_byte": nats / math.log(2) / num_bytes,
        }
