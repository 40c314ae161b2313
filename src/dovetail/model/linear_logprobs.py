"""The language-model head fused with log-softmax: log-probabilities of given tokens, chunk by chunk.

Responsible for: a model's head as a function of hidden states (`LMHead`), and log-probabilities, entropies and
cross-entropy in float32, forward and backward, without ever holding all logits.
Not responsible for: which hidden state scores which token (forward.py).

It needs the memory of one chunk of logits. Backward computes each chunk's logits again, except for the cross-entropy.

Shapes: A tokens to score, C tokens of one chunk, V vocabulary, D width of the hidden states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from dovetail.errors import ModelError
from dovetail.planning.memory import LOGITS_CHUNK_BYTES

CHUNK_BYTES = 256 * 2**20
"""The size of one chunk of logits on a CPU. On a GPU each chunk also adds a gradient as large as the weight to the
sum, so that they are larger."""


class SharedVocabulary(Protocol):
    """The collectives of processes that each hold some rows of a head; all compute the same chunks in step."""

    first: int
    """The first row that this process holds."""

    def copied(self, hidden: Tensor) -> Tensor:
        """Return the same tensor; its gradient is summed over the processes."""
        ...

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over the processes, computed in place."""
        ...

    def max(self, tensor: Tensor) -> Tensor:
        """Return the maximum over the processes, element by element, computed in place."""
        ...


@dataclass(frozen=True, slots=True)
class LMHead:
    """The head logits = softcap * tanh(scale * (h W' + b) / softcap), without the cap where `softcap` is None."""

    weight_VD: Tensor
    bias_V: Tensor | None = None
    softcap: float | None = None
    """Gemma 2's final_logit_softcapping."""
    logit_scale: float = 1.0
    """Cohere's logit_scale, or 1 / Granite's logits_scaling."""
    shared: SharedVocabulary | None = None
    """The collectives with the processes that hold the other rows; None where the weight has all rows."""

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Return [N, V] in float32 at least, whatever the precision of the weights, for the rows in this process."""
        return _cap(_raw_logits(hidden_ND, self.weight_VD, self.bias_V, self.logit_scale), self.softcap)


def head_of(model: Any) -> LMHead:
    """Return the head of a causal language model, peft-wrapped or not, tied or not."""
    inner: PreTrainedModel = model.get_base_model() if hasattr(model, "get_base_model") else model
    linear: Any = inner.get_output_embeddings()  # type: ignore[no-untyped-call]
    if linear is None:
        raise ModelError(f"{type(inner).__name__} has no language-model head", hint="load a ...ForCausalLM")
    if not isinstance(getattr(linear, "weight", None), Tensor) or hasattr(linear, "base_layer"):
        raise ModelError(f"the head of {type(inner).__name__} is a {type(linear).__name__}, not plain linear")
    config = inner.config.get_text_config()
    softcap = getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None)
    named = getattr(config, "logit_scale", None)
    scale = None if isinstance(named, str) else named  # MPT's, in words, which transformers does not apply
    scale = scale or getattr(config, "lm_head_multiplier", None) or 1.0
    scale /= getattr(config, "logits_scaling", None) or 1.0
    shared = getattr(linear, "shared_vocabulary", None)
    return LMHead(linear.weight, getattr(linear, "bias", None), softcap, float(scale), shared)


def linear_logprobs(
    hidden_AD: Tensor,
    head: LMHead,
    next_ids_A: Tensor,
    *,
    temperature: float = 1.0,
    with_entropy: bool = False,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return log softmax(logits / temperature)[next id] of each row, and the entropy of that distribution in nats.

    float32 (float64 for float64 inputs). Gradients reach hidden states, head weight and bias (the weight's is
    summed in float32 over the chunks); the entropy carries none.
    """
    how = _How.of(head, hidden_AD, temperature, with_entropy=with_entropy, chunk_tokens=chunk_tokens)
    hidden_AD = hidden_AD if head.shared is None else head.shared.copied(hidden_AD)
    logprobs_A, entropy_A = _LinearLogprobs.apply(  # type: ignore[no-untyped-call]
        hidden_AD, head.weight_VD, head.bias_V, next_ids_A, how
    )
    return logprobs_A, entropy_A if with_entropy else None


def linear_cross_entropy(
    hidden_AD: Tensor, head: LMHead, next_ids_A: Tensor, *, chunk_tokens: int | None = None
) -> Tensor:
    """Return - sum of log softmax(logits)[next id] over the rows: a scalar, float32 (float64 for float64 inputs).

    Each row counts alike, so the slopes are known while a chunk's logits are there: the gradients are computed
    beside the sum, and backward only multiplies them. That saves a third of the head's products.
    """
    how = _How.of(head, hidden_AD, 1.0, with_entropy=False, chunk_tokens=chunk_tokens)
    hidden_AD = hidden_AD if head.shared is None else head.shared.copied(hidden_AD)
    inputs = hidden_AD, head.weight_VD, head.bias_V
    learns = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    total: Tensor = _LinearCrossEntropy.apply(*inputs, next_ids_A, how, learns)  # type: ignore[no-untyped-call]
    return total


@dataclass(frozen=True, slots=True)
class _How:
    temperature: float
    softcap: float | None
    logit_scale: float
    with_entropy: bool
    chunk_tokens: int
    dtype: torch.dtype
    """The weight's precision, to which the kernel rounds slopes."""
    shared: SharedVocabulary | None

    @classmethod
    def of(
        cls,
        head: LMHead,
        hidden_AD: Tensor,
        temperature: float,
        *,
        with_entropy: bool,
        chunk_tokens: int | None,
    ) -> _How:
        """Return the settings for a head.

        chunk_tokens: None for as many as CHUNK_BYTES hold, or LOGITS_CHUNK_BYTES on a GPU.
        """
        limit = LOGITS_CHUNK_BYTES if hidden_AD.is_cuda else CHUNK_BYTES
        tokens = chunk_tokens or max(1, limit // (4 * head.weight_VD.shape[0]))
        scale, dtype = head.logit_scale, head.weight_VD.dtype
        return cls(temperature, head.softcap, scale, with_entropy, tokens, dtype, head.shared)

    @property
    def scale(self) -> float:
        """The factor of the logits before the softmax, where nothing caps them in between."""
        return self.logit_scale / self.temperature

    def rows(self, ids_C: Tensor, num_rows: int) -> Tensor:
        """Return the rows of these ids; -1 for those that another process has."""
        if self.shared is None:
            return ids_C
        rows_C = ids_C - self.shared.first
        return rows_C.masked_fill((rows_C < 0) | (rows_C >= num_rows), -1)


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_AD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, next_ids_A: Tensor, how: _How
    ) -> tuple[Tensor, Tensor]:
        float_type = torch.promote_types(hidden_AD.dtype, torch.float32)
        logprobs_A = hidden_AD.new_empty(len(hidden_AD), dtype=float_type)
        log_totals_A = torch.empty_like(logprobs_A)
        entropy_A = torch.empty_like(logprobs_A) if how.with_entropy else logprobs_A.new_empty(0)
        weight_VD = _multipliable(weight_VD)
        for chunk in _chunks(len(hidden_AD), how.chunk_tokens):
            logits_CV = _logits(hidden_AD[chunk], weight_VD, bias_V, how)
            found = _softmax(logits_CV, next_ids_A[chunk], how)
            logprobs_A[chunk], log_totals_A[chunk] = found[:2]
            if found[2] is not None:
                entropy_A[chunk] = found[2]
        ctx.save_for_backward(hidden_AD, weight_VD, bias_V, next_ids_A, log_totals_A)
        ctx.how = how
        ctx.mark_non_differentiable(entropy_A)
        return logprobs_A, entropy_A

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden_AD, weight_VD, bias_V, next_ids_A, log_totals_A = ctx.saved_tensors
        how, sums = ctx.how, _Gradients(hidden_AD, weight_VD, bias_V, ctx.needs_input_grad)
        for chunk in _chunks(len(hidden_AD), how.chunk_tokens):
            logits_CV = _logits(hidden_AD[chunk], weight_VD, bias_V, how)
            sums.add(chunk, _slopes(logits_CV, next_ids_A[chunk], log_totals_A[chunk], grads[0][chunk], how))
        return sums.hidden_AD, sums.weight_VD, sums.bias_V, None, None


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_AD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, next_ids_A: Tensor, how: _How,
        learns: bool,
    ) -> Tensor:  # fmt: skip
        total = hidden_AD.new_zeros((), dtype=torch.promote_types(hidden_AD.dtype, torch.float32))
        multipliable_VD = _multipliable(weight_VD)
        wants = ctx.needs_input_grad if learns else (False, False, False)
        sums = _Gradients(hidden_AD, multipliable_VD, bias_V, wants)
        for chunk in _chunks(len(hidden_AD), how.chunk_tokens):
            logits_CV = _logits(hidden_AD[chunk], multipliable_VD, bias_V, how)
            logprobs_C, log_totals_C, _ = _softmax(logits_CV, next_ids_A[chunk], how)
            total -= logprobs_C.sum()
            if learns:
                minus_one_C = torch.full_like(logprobs_C, -1.0)
                sums.add(chunk, _slopes(logits_CV, next_ids_A[chunk], log_totals_C, minus_one_C, how))
        ctx.save_for_backward(sums.hidden_AD, sums.weight_VD, sums.bias_V)
        ctx.dtypes = hidden_AD.dtype, weight_VD.dtype, None if bias_V is None else bias_V.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [
            None if sum_ is None else torch.mul(sum_, grads[0], out=torch.empty_like(sum_, dtype=dtype))
            for sum_, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*scaled, None, None, None)


class _Gradients:
    """The gradients of a sum over chunks for hidden states, weight and bias; None for one that needs none."""

    def __init__(
        self, hidden_AD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, wants: Sequence[bool]
    ) -> None:
        """Start from zero; weight_VD: in the precision of the matrix products, see `_multipliable`."""
        float_type = torch.promote_types(hidden_AD.dtype, torch.float32)
        self._inputs = hidden_AD, weight_VD
        self.hidden_AD = torch.empty_like(hidden_AD) if wants[0] else None
        self.weight_VD = torch.zeros_like(weight_VD, dtype=float_type) if wants[1] else None
        self.bias_V = torch.zeros_like(bias_V, dtype=float_type) if wants[2] and bias_V is not None else None

    def add(self, chunk: slice, slopes_CV: Tensor) -> None:
        """Add what the rows of one chunk contribute; slopes_CV: the gradients of their logits."""
        hidden_AD, weight_VD = self._inputs
        if self.bias_V is not None:
            self.bias_V += slopes_CV.sum(dim=0, dtype=self.bias_V.dtype)
        slopes_CV = slopes_CV.to(weight_VD.dtype)
        if self.hidden_AD is not None:
            self.hidden_AD[chunk] = slopes_CV @ weight_VD
        if self.weight_VD is not None:
            _add_product(self.weight_VD, slopes_CV.T, hidden_AD[chunk].to(weight_VD.dtype))


def _logits(hidden_CD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, how: _How) -> Tensor:
    """Return new logits [C, V]: before the temperature; and before the logit scale where kernels apply both."""
    if _has_kernel(hidden_CD, how):
        return _raw_logits(hidden_CD, weight_VD, bias_V, 1.0)
    return _cap(_raw_logits(hidden_CD, weight_VD, bias_V, how.logit_scale), how.softcap)


def _softmax(logits_CV: Tensor, ids_C: Tensor, how: _How) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return (log-probability of the id, log of the total, entropy if asked for), [C] each.

    The logits are those of `_logits`; plain torch divides them by the temperature in place.
    """
    if how.shared is None:
        return _own_softmax(logits_CV, ids_C, how)
    rows_C = how.rows(ids_C, logits_CV.shape[1])
    logprobs_C, log_totals_C, entropy_C = _own_softmax(logits_CV, rows_C.clamp(min=0), how)
    # Each process adds its share of the total, the id's logit if it has it, and its mean logit times its share.
    top_C = how.shared.max(log_totals_C.clone())
    share_C = (log_totals_C - top_C).exp_()
    parts = [share_C, (logprobs_C + log_totals_C).masked_fill_(rows_C < 0, 0.0)]
    parts += [] if entropy_C is None else [share_C * (log_totals_C - entropy_C)]
    sums = how.shared.sum(torch.stack(parts))
    all_C = top_C + sums[0].log()
    return sums[1] - all_C, all_C, all_C - sums[2] / sums[0] if entropy_C is not None else None


def _own_softmax(logits_CV: Tensor, ids_C: Tensor, how: _How) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the same as `_softmax` over the rows in this process alone; `ids_C` are among them."""
    if _has_kernel(logits_CV, how):
        logprobs_C, log_totals_C, entropy_C = _kernels().softmax_rows(
            logits_CV, ids_C, scale=how.scale, with_entropy=how.with_entropy
        )
        return logprobs_C, log_totals_C, entropy_C if how.with_entropy else None
    if how.temperature != 1.0:
        logits_CV.div_(how.temperature)
    log_totals_C = logits_CV.logsumexp(dim=-1)
    logprobs_C = logits_CV.gather(-1, ids_C[:, None]).squeeze(-1) - log_totals_C
    if not how.with_entropy:
        return logprobs_C, log_totals_C, None
    probs_CV = (logits_CV - log_totals_C[:, None]).exp_()
    return logprobs_C, log_totals_C, log_totals_C - torch.linalg.vecdot(probs_CV, logits_CV)


def _slopes(logits_CV: Tensor, ids_C: Tensor, log_totals_C: Tensor, grad_C: Tensor, how: _How) -> Tensor:
    """Return [C, V]: d logprob / d logit = [is the token] - probability, times the incoming gradient.

    The logits are those of `_logits`, and may be overwritten.
    """
    slope_C = grad_C * how.scale
    rows_C = how.rows(ids_C, logits_CV.shape[1])
    if _has_kernel(logits_CV, how):
        slopes_CV: Tensor = _kernels().softmax_slopes(
            logits_CV, rows_C, log_totals_C, slope_C, scale=how.scale, dtype=how.dtype
        )
        return slopes_CV
    # Without a cap the logits are not needed again: the probabilities may take their place.
    probs_CV = logits_CV if how.softcap is None else logits_CV.clone()
    if how.temperature != 1.0:
        probs_CV.div_(how.temperature)
    probs_CV.sub_(log_totals_C[:, None]).exp_()
    own_slope_C = slope_C if how.shared is None else slope_C.masked_fill(rows_C < 0, 0.0)
    grad_CV = probs_CV.mul_(-slope_C[:, None])
    grad_CV.scatter_add_(-1, rows_C.clamp(min=0)[:, None], own_slope_C[:, None])
    if how.softcap is not None:
        grad_CV.mul_(1 - (logits_CV / how.softcap).square_())
    return grad_CV


def _has_kernel(hidden_ND: Tensor, how: _How) -> bool:
    return hidden_ND.is_cuda and hidden_ND.dtype != torch.float64 and how.softcap is None


@cache
def _kernels() -> Any:
    """Import the kernels when a GPU needs them: Triton is installed for GPUs only."""
    from dovetail.model import head_kernels

    return head_kernels


def _raw_logits(hidden_CD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, scale: float) -> Tensor:
    """Return scale * (h W' + b) in a new float32 (or float64) tensor."""
    logits_CV = _product(hidden_CD, weight_VD.T)
    if bias_V is not None:
        logits_CV += bias_V
    return logits_CV if scale == 1.0 else logits_CV.mul_(scale)


def _cap(logits_CV: Tensor, softcap: float | None) -> Tensor:
    return logits_CV if softcap is None else (logits_CV / softcap).tanh_().mul_(softcap)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Return left @ right, not rounded to half precision at the end (near -10, bfloat16 steps by 0.0625)."""
    if right.dtype in (torch.bfloat16, torch.float16):
        if left.is_cuda and left.dtype == right.dtype:
            return torch.mm(left, right, out_dtype=torch.float32)
        return left.float() @ right.float()
    return left.to(right.dtype) @ right


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if right.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += _product(left, right)


def _multipliable(weight_VD: Tensor) -> Tensor:
    """Return the weight for matrix products: CPUs have no half-precision product with a float32 result."""
    if weight_VD.is_cuda or weight_VD.dtype == torch.float64:
        return weight_VD
    return weight_VD.float()


def _chunks(num_rows: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]
