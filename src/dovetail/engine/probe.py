"""Try once how a model can generate, before its first answer.

Responsible for: the fastest way whose answers are those of the plain forward, found by trying on three prompts.
Not responsible for: the ways themselves (paged.py, padded.py), how batches are read (model/probe.py), the
lengths of a run (parity.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dovetail.engine.forward import PackedModules
from dovetail.engine.kv_cache import KVShape
from dovetail.engine.padded import SlowGeneration, SlowWay
from dovetail.engine.paged import Limits, PagedGeneration
from dovetail.engine.sampling import Sampling
from dovetail.engine.scheduler import Answer, Listener
from dovetail.maths.masked import at_least_float32
from dovetail.model.forward import context_of, evaluation_mode, is_probed, why_not_packed
from dovetail.model.plain_forward import attention_restored, plain_attention, plain_logits
from dovetail.model.probe import probe, probe_rows, short_limits
from dovetail.model.rope import depends_on_length
from dovetail.model.tolerance import TOLERANCES, first_beyond, is_exact, nudged_embeddings

Run = Callable[[Sequence[Answer], Listener], object]

_NEW_TOKENS = 8
_BATCH = 3
_PREFILL_TOKENS = 1024
_CACHED: tuple[SlowWay, ...] = ("padded", "equal")


@dataclass(frozen=True, slots=True)
class Way:
    """The way a model generates."""

    shape: KVShape | None
    """The sizes of what each token stores in pages; None if the model does not generate over pages."""
    slow: SlowWay = "padded"
    """The way of a model that does not."""
    reason: str | None = None
    """The reason why it does not generate over pages."""


def find_way(modules: PackedModules, model: PreTrainedModel, device: torch.device) -> Way:
    """Find the fastest way to generate that agrees with the plain forward. Modes and attention stay as they are."""
    is_divided = modules.group.size > 1  # a process cannot try it alone
    if not is_divided and not is_probed(model):
        probe(model)
    reason = why_not_packed(model)
    if reason is None:
        shape = modules.kv_shape()
        fault: str | None = "has layers that are not attention over plain keys"
        if shape is not None:
            fault = (
                None if is_divided else _fault(model, _paged(modules, shape, device), modules.our_attention)
            )
        if fault is None:
            return Way(shape)
        reason = f"{type(model).__name__} {fault}"
    return Way(None, "padded" if is_divided else _slow_way(model), reason)


def _slow_way(model: PreTrainedModel) -> SlowWay:
    if not depends_on_length(model):  # else the keys that a cache holds would be those of another length
        for way in _CACHED:
            slow = SlowGeneration(model, way, batch_size=_BATCH)
            if _fault(model, slow.run, slow.attention) is None:
                return way
    return "reread"


def _paged(modules: PackedModules, shape: KVShape, device: torch.device) -> Run:
    def run(answers: Sequence[Answer], listener: Listener) -> None:
        limits = Limits(max_running=len(answers), max_prefill_tokens=_PREFILL_TOKENS, max_cache_tokens=None)
        # What a captured graph replays is what is tried here.
        paged = PagedGeneration(modules, shape, device, limits, may_capture=False)
        try:
            paged.reserve(answers)
            paged.run(answers, listener)
        finally:
            paged.close()

    return run


@torch.no_grad()
def _fault(
    model: PreTrainedModel, run: Run, attention: Callable[[], AbstractContextManager[None]]
) -> str | None:
    """Return how greedy answers to three prompts differ from the plain forward of each alone; None if they agree."""
    with evaluation_mode(model), attention_restored(model), short_limits(model):
        answers = _answers(model)
        try:
            with attention():
                run(answers, Listener())
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # any class may break in its own way; the next way is tried
            return f"cannot answer over pages ({type(error).__name__}: {str(error).partition(chr(10))[0]})"
        with plain_attention(model):
            plain = [_of_the_plain_forward(model, answer) for answer in answers]
            noise_A = None
            if not is_exact(model.dtype):
                with nudged_embeddings(model):
                    nudged = [_of_the_plain_forward(model, answer)[0] for answer in answers]
                noise_A = torch.cat([(a - b).abs() for a, (b, _) in zip(nudged, plain, strict=True)])
    if not all(logprob_A.isfinite().all() for logprob_A, _ in plain):
        return None  # a model that gives NaN or infinities cannot judge the way
    found = [torch.tensor(answer.logprobs, device=plain[0][0].device) for answer in answers]
    gap_A = torch.cat(
        [
            torch.maximum((ours_A - theirs_A).abs(), short_A)
            for ours_A, (theirs_A, short_A) in zip(found, plain, strict=True)
        ]
    )
    if first_beyond(gap_A, TOLERANCES[model.dtype].largest, noise_A) is None:
        return None
    return f"does not answer over pages as its own forward does ({float(gap_A.max()):.2g} nats apart)"


def _answers(model: PreTrainedModel) -> list[Answer]:
    context = context_of(model)
    rows = [row if context is None else row[: max(1, context - _NEW_TOKENS)] for row in probe_rows(model)]
    sampling = Sampling(max_new_tokens=_NEW_TOKENS, temperature=0.0)
    return [Answer(i, tuple(row), sampling, i, _NEW_TOKENS) for i, row in enumerate(rows)]


def _of_the_plain_forward(model: PreTrainedModel, answer: Answer) -> tuple[Tensor, Tensor]:
    """Return log-probabilities of the answer's tokens, and how far their logits lie below the best ones."""
    last = len(answer.token_ids) + 1
    logits_AV = at_least_float32(plain_logits(model, answer.all_ids, last=last))[:-1]
    ids_A1 = torch.tensor(answer.token_ids, device=logits_AV.device)[:, None]
    short_A = logits_AV.max(dim=-1).values - logits_AV.gather(1, ids_A1)[:, 0]
    return logits_AV.log_softmax(dim=-1).gather(1, ids_A1)[:, 0], short_A
