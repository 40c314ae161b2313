"""The slow, plain ways to generate, for models that cannot generate over pages.

Responsible for: batches over the model's own cache, left-padded or of one length, and batches that are read anew for
every token; same requests, draws and endings as the fast way.
Not responsible for: which way a model takes (probe.py), or speed: batches wait for their longest answer.

Shapes: S sequences of one batch, L padded length, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dovetail.batches import pack
from dovetail.engine.forward import Draw, draw_next, sampling_rows
from dovetail.engine.paged import Source
from dovetail.engine.scheduler import Answer, Listener, Load
from dovetail.model.forward import read_by, reading_of, vocabulary_of
from dovetail.model.linear_logprobs import head_of
from dovetail.model.plain_forward import plain_attention, without_extras

SlowWay = Literal["padded", "equal", "reread"]
"""The slow ways: left-padded batches over a cache; such batches of prompts of one length; no cache at all."""

SLOW_WAYS: dict[SlowWay, str] = {
    "padded": "generation falls back to padded batches, which is right but slower",
    "equal": "generation falls back to padded batches, and only of prompts of one length, which is right but slower",
    "reread": "generation reads every sequence again for each token, which is right but much slower",
}
"""The text of the warning for each way."""


class SlowGeneration:
    """Generation of one model, batch after batch."""

    def __init__(self, model: PreTrainedModel, way: SlowWay, *, batch_size: int) -> None:
        self._model = model
        self._way = way
        self._batch_size = batch_size

    def attention(self) -> AbstractContextManager[None]:
        """Return a context with the attention that this way of generating needs."""
        return nullcontext() if self._way == "reread" else plain_attention(self._model)

    def run(self, answers: Sequence[Answer], listener: Listener) -> None:
        """Bring every answer to its end, similar prompt lengths together."""
        waiting = sorted(answers, key=lambda answer: len(answer.prompt))
        while waiting:
            for _ in self._steps(self._take_batch(waiting), listener):
                continue

    def serve(self, source: Source, listener: Listener) -> None:
        """Answer what the source hands over, one batch at a time, until it signals that no more will come."""
        waiting: list[Answer] = []
        steps: Iterator[None] = iter(())
        running: list[Answer] = []
        while (arrived := source.poll(Load(len(running), len(waiting), 0))) is not None:
            waiting = [answer for answer in [*waiting, *arrived] if answer.finish_reason is None]
            if not running and waiting:
                running = self._take_batch(waiting)
                steps = self._steps(running, listener)
            if next(steps, self) is self:
                running = []

    def _take_batch(self, waiting: list[Answer]) -> list[Answer]:
        """Take the first one that waits and others that may run beside it."""
        length = len(waiting[0].prompt)
        may_join = [a for a in waiting if self._way != "equal" or len(a.prompt) == length]
        batch = may_join[: self._batch_size]
        waiting[:] = [answer for answer in waiting if answer not in batch]
        return batch

    def _steps(self, answers: Sequence[Answer], listener: Listener) -> Iterator[None]:
        """Yield after every token of the batch, until all of it has ended."""
        steps = self._reread if self._way == "reread" else self._decode
        return steps(answers, listener)

    def _reread(self, answers: Sequence[Answer], listener: Listener) -> Iterator[None]:
        device, way = next(self._model.parameters()).device, reading_of(self._model).way
        while open_answers := [answer for answer in answers if answer.finish_reason is None]:
            ids = [answer.all_ids for answer in open_answers]
            batch = pack(ids, [[False] * len(row) for row in ids]).to(device)
            with torch.no_grad():
                hidden_TD = read_by(way, self._model, batch)
                logits_SV = head_of(self._model).logits(hidden_TD[batch.last_index_S()])
            rows = sampling_rows(open_answers, vocabulary_of(self._model), device)
            Draw.of(open_answers, draw_next(logits_SV, rows)[1]).deliver(listener)
            yield

    def _decode(self, answers: Sequence[Answer], listener: Listener) -> Iterator[None]:
        device = next(self._model.parameters()).device
        length = max(len(answer.prompt) for answer in answers)
        padded = [[0] * (length - len(answer.prompt)) + list(answer.prompt) for answer in answers]
        ids_SL = torch.tensor(padded, device=device)
        starts_S = torch.tensor([length - len(answer.prompt) for answer in answers], device=device)
        mask_SL = (torch.arange(length, device=device) >= starts_S[:, None]).long()
        rows = sampling_rows(answers, vocabulary_of(self._model), device)
        cache: Any = None
        while any(answer.finish_reason is None for answer in answers):
            with torch.no_grad():
                logits_SV, cache = _forward(self._model, ids_SL, mask_SL, cache)
            ids_S, numbers = draw_next(logits_SV, rows)
            rows.advance(ids_S)
            Draw.of(answers, numbers).deliver(listener)  # finished rows go on, and their tokens are ignored
            ids_SL = ids_S[:, None]
            mask_SL = torch.cat([mask_SL, mask_SL.new_ones(len(answers), 1)], dim=1)
            yield


def _forward(model: PreTrainedModel, ids_SL: Tensor, mask_SL: Tensor, cache: Any) -> tuple[Tensor, Any]:
    """Return logits of each row's next token, and the cache with these tokens in it."""
    known = inspect.signature(model.forward).parameters
    extra: dict[str, Any] = dict(without_extras(model))
    if "position_ids" in known:
        extra["position_ids"] = (mask_SL.cumsum(dim=-1) - 1).clamp(min=0)[:, -ids_SL.shape[1] :]
    if "logits_to_keep" in known:
        extra["logits_to_keep"] = 1
    output = model(input_ids=ids_SL, attention_mask=mask_SL, past_key_values=cache, use_cache=True, **extra)
    return output.logits[:, -1], output.past_key_values
