"""Move small numbers between host and device without waiting.

Responsible for: index tensors made from Python lists, and the numbers of a draw on their way back.
Not responsible for: batches of training (batches.py).

Shapes: S answers that drew a token, K likeliest tokens at its place (0 unless asked for), N = 2 + 2K numbers of each:
token id and log-probability of the one drawn, then the ids, then the log-probabilities of the likeliest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dovetail.engine.answers import Answer, Listener, TopLogprobs
from dovetail.engine.sampling import SamplingRows, likeliest_next, sample_next


def to_device(values: Sequence[int], device: torch.device, dtype: torch.dtype = torch.long) -> Tensor:
    """Return the numbers as a tensor on the device.

    A small copy from unpinned memory is staged, so that the host need not wait, or keep the source.
    """
    return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)


@dataclass(frozen=True, slots=True)
class Draw:
    """Tokens on their way to the host, one for each answer."""

    answers: Sequence[Answer]
    numbers: Tensor
    """float64 [N, S] on the host, token ids exact up to 2^53; valid after `arrived`."""
    arrived: torch.cuda.Event | None

    @classmethod
    def of(cls, answers: Sequence[Answer], numbers: Tensor) -> Draw:
        """Send float64 [N, S] on its way, and count a token of each answer as pending."""
        for answer in answers:
            answer.num_pending += 1
        if not numbers.is_cuda:
            return cls(answers, numbers, None)
        host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
        host.copy_(numbers, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return cls(answers, host, event)

    def deliver(self, listener: Listener) -> None:
        """Wait for the numbers and hand each answer its token; answers that have ended take none."""
        if self.arrived is not None:
            self.arrived.synchronize()
        ids, logprobs, *likeliest = self.numbers.tolist()
        columns = zip(*likeliest, strict=True) if likeliest else [()] * len(ids)
        for answer, token_id, logprob, column in zip(self.answers, ids, logprobs, columns, strict=True):
            answer.num_pending -= 1
            if answer.finish_reason is None:
                answer.accept(int(token_id), logprob, listener, _pairs(column))


def draw_next(logits_SV: Tensor, rows: SamplingRows) -> tuple[Tensor, Tensor]:
    """Return the next token ids [S], and the numbers of a `Draw`, float64 [N, S]."""
    ids_S, logprobs_S = sample_next(logits_SV, rows)
    numbers = torch.stack([ids_S.double(), logprobs_S.double()])
    if not rows.num_likeliest:
        return ids_S, numbers
    ids_SK, logprobs_SK = likeliest_next(logits_SV, rows, min(rows.num_likeliest, logits_SV.shape[1]))
    return ids_S, torch.cat([numbers, ids_SK.T.double(), logprobs_SK.T.double()])


def _pairs(column: Sequence[float]) -> TopLogprobs:
    half = len(column) // 2
    return [
        (int(token_id), logprob)
        for token_id, logprob in zip(column[:half], column[half:], strict=True)
        if logprob > -math.inf
    ]
