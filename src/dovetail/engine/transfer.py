"""Small numbers between host and device without waiting.

Responsible for: index tensors made from Python lists, and the numbers of a draw on their way back.
Not responsible for: batches of training (batches.py).

Shapes: S answers that drew a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dovetail.engine.answers import Answer, Listener


def to_device(values: Sequence[int], device: torch.device, dtype: torch.dtype = torch.long) -> Tensor:
    """The numbers as a tensor there. A small copy from unpinned memory is staged: nobody waits, nothing is lost."""
    return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)


@dataclass(frozen=True, slots=True)
class Draw:
    """Tokens on their way to the host, one for each answer."""

    answers: Sequence[Answer]
    numbers: Tensor
    """float64 [2, S] on the host: token ids (exact up to 2^53) and log-probabilities; valid after `arrived`."""
    arrived: torch.cuda.Event | None

    @classmethod
    def of(cls, answers: Sequence[Answer], numbers: Tensor) -> Draw:
        """Send float64 [2, S] on its way, and count a token of each answer as pending."""
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
        ids, logprobs = self.numbers.tolist()
        for answer, token_id, logprob in zip(self.answers, ids, logprobs, strict=True):
            answer.num_pending -= 1
            if answer.finish_reason is None:
                answer.accept(int(token_id), logprob, listener)


def numbers_of(ids_S: Tensor, logprobs_S: Tensor) -> Tensor:
    """float64 [2, S]: what a `Draw` carries."""
    return torch.stack([ids_S.double(), logprobs_S.double()])
