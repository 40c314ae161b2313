"""The language-model head fused with log-softmax: log-probabilities of given tokens, chunk by chunk.

Responsible for: what a model's head does to hidden states (`LMHead`), and log-probabilities and entropies in
float32, forward and backward, without ever holding all logits.
Not responsible for: which hidden state scores which token (forward.py).

Memory is that of one chunk of logits; backward computes each chunk's logits again.

Shapes: A tokens to score, C tokens of one chunk, V vocabulary, D width of the hidden states.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from dovetail.errors import ModelError

CHUNK_BYTES = 256 * 2**20
CUDA_CHUNK_BYTES = 2**30
"""Of the logits of one chunk. On a GPU each chunk also adds a gradient as large as the weight to the sum."""


@dataclass(frozen=True, slots=True)
class LMHead:
    """logits = softcap * tanh(scale * (h W' + b) / softcap), without the cap where `softcap` is None."""

    weight_VD: Tensor
    bias_V: Tensor | None = None
    softcap: float | None = None
    """Gemma 2's final_logit_softcapping."""
    logit_scale: float = 1.0
    """Cohere's logit_scale, or 1 / Granite's logits_scaling."""

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """[N, V] in float32 at least, whatever the precision of the weights."""
        return _cap(_raw_logits(hidden_ND, self.weight_VD, self.bias_V, self.logit_scale), self.softcap)


def head_of(model: Any) -> LMHead:
    """The head of a causal language model, peft-wrapped or not, tied or not."""
    inner: PreTrainedModel = model.get_base_model() if hasattr(model, "get_base_model") else model
    linear: Any = inner.get_output_embeddings()  # type: ignore[no-untyped-call]
    if linear is None:
        raise ModelError(f"{type(inner).__name__} has no language-model head", hint="load a ...ForCausalLM")
    if not isinstance(getattr(linear, "weight", None), Tensor) or hasattr(linear, "base_layer"):
        raise ModelError(f"the head of {type(inner).__name__} is a {type(linear).__name__}, not plain linear")
    config = inner.config.get_text_config()
    softcap = getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None)
    scale = getattr(config, "logit_scale", None) or getattr(config, "lm_head_multiplier", None) or 1.0
    scale /= getattr(config, "logits_scaling", None) or 1.0
    return LMHead(linear.weight, getattr(linear, "bias", None), softcap, float(scale))


def linear_logprobs(
    hidden_AD: Tensor,
    head: LMHead,
    next_ids_A: Tensor,
    *,
    temperature: float = 1.0,
    with_entropy: bool = False,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """log softmax(logits / temperature)[next id] of each row, and the entropy of that distribution in nats.

    float32 (float64 for float64 inputs). Gradients reach hidden states, head weight and bias (the weight's is
    summed in float32 over the chunks); the entropy carries none.
    """
    if chunk_tokens is None:
        limit = CUDA_CHUNK_BYTES if hidden_AD.is_cuda else CHUNK_BYTES
        chunk_tokens = max(1, limit // (4 * head.weight_VD.shape[0]))
    how = _How(temperature, head.softcap, head.logit_scale, with_entropy, chunk_tokens)
    logprobs_A, entropy_A = _LinearLogprobs.apply(  # type: ignore[no-untyped-call]
        hidden_AD, head.weight_VD, head.bias_V, next_ids_A, how
    )
    return logprobs_A, entropy_A if with_entropy else None


@dataclass(frozen=True, slots=True)
class _How:
    temperature: float
    softcap: float | None
    logit_scale: float
    with_entropy: bool
    chunk_tokens: int

    @property
    def scale(self) -> float:
        """What logits are multiplied by before the softmax, where nothing caps them in between."""
        return self.logit_scale / self.temperature


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
            if _has_kernel(hidden_AD, how):
                logits_CV = _raw_logits(hidden_AD[chunk], weight_VD, bias_V, 1.0)
                found = _kernels().softmax_rows(
                    logits_CV, next_ids_A[chunk], scale=how.scale, with_entropy=how.with_entropy
                )
                logprobs_A[chunk], log_totals_A[chunk] = found[:2]
                if how.with_entropy:
                    entropy_A[chunk] = found[2]
                continue
            logits_CV = _cap(_raw_logits(hidden_AD[chunk], weight_VD, bias_V, how.logit_scale), how.softcap)
            logits_CV = _divided(logits_CV, how.temperature)
            log_totals_C = logits_CV.logsumexp(dim=-1)
            log_totals_A[chunk] = log_totals_C
            logprobs_A[chunk] = logits_CV.gather(-1, next_ids_A[chunk, None]).squeeze(-1) - log_totals_C
            if how.with_entropy:
                probs_CV = (logits_CV - log_totals_C[:, None]).exp_()
                entropy_A[chunk] = log_totals_C - torch.linalg.vecdot(probs_CV, logits_CV)
        ctx.save_for_backward(hidden_AD, weight_VD, bias_V, next_ids_A, log_totals_A)
        ctx.how = how
        ctx.mark_non_differentiable(entropy_A)
        return logprobs_A, entropy_A

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden_AD, weight_VD, bias_V, next_ids_A, log_totals_A = ctx.saved_tensors
        how, (wants_hidden, wants_weight, wants_bias) = ctx.how, ctx.needs_input_grad[:3]
        float_type = log_totals_A.dtype
        grad_hidden_AD = torch.empty_like(hidden_AD) if wants_hidden else None
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=float_type) if wants_weight else None
        grad_bias_V = torch.zeros_like(bias_V, dtype=float_type) if wants_bias else None
        for chunk in _chunks(len(hidden_AD), how.chunk_tokens):
            grad_CV = _grad_of_logits(hidden_AD[chunk], weight_VD, bias_V, next_ids_A[chunk], log_totals_A[chunk],
                                      grads[0][chunk], how)  # fmt: skip
            if grad_bias_V is not None:
                grad_bias_V += grad_CV.sum(dim=0)
            grad_CV = grad_CV.to(weight_VD.dtype)
            if grad_hidden_AD is not None:
                grad_hidden_AD[chunk] = grad_CV @ weight_VD
            if grad_weight_VD is not None:
                _add_product(grad_weight_VD, grad_CV.T, hidden_AD[chunk].to(weight_VD.dtype))
        return grad_hidden_AD, grad_weight_VD, grad_bias_V, None, None


def _grad_of_logits(
    hidden_CD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, ids_C: Tensor, log_totals_C: Tensor,
    grad_C: Tensor, how: _How,
) -> Tensor:  # fmt: skip
    """[C, V]: d logprob / d logit = [is the token] - probability, times what comes from above."""
    slope_C = grad_C * how.scale
    if _has_kernel(hidden_CD, how):
        logits_CV = _raw_logits(hidden_CD, weight_VD, bias_V, 1.0)
        slopes_CV: Tensor = _kernels().softmax_slopes(
            logits_CV, ids_C, log_totals_C, slope_C, scale=how.scale, dtype=weight_VD.dtype
        )
        return slopes_CV
    capped_CV = _cap(_raw_logits(hidden_CD, weight_VD, bias_V, how.logit_scale), how.softcap)
    # Without a cap nobody needs the logits once more: the probabilities may take their place.
    logits_CV = capped_CV if how.softcap is None else capped_CV.clone()
    probs_CV = _divided(logits_CV, how.temperature).sub_(log_totals_C[:, None]).exp_()
    grad_CV = probs_CV.mul_(-slope_C[:, None]).scatter_add_(-1, ids_C[:, None], slope_C[:, None])
    if how.softcap is not None:
        grad_CV.mul_(1 - (capped_CV / how.softcap).square_())
    return grad_CV


def _has_kernel(hidden_ND: Tensor, how: _How) -> bool:
    return hidden_ND.is_cuda and hidden_ND.dtype != torch.float64 and how.softcap is None


@cache
def _kernels() -> Any:
    """Triton is there on GPUs only."""
    from dovetail.model import head_kernels

    return head_kernels


def _raw_logits(hidden_CD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, scale: float) -> Tensor:
    """scale * (h W' + b) in a fresh float32 (or float64) tensor."""
    logits_CV = _product(hidden_CD, weight_VD.T)
    if bias_V is not None:
        logits_CV += bias_V
    return logits_CV if scale == 1.0 else logits_CV.mul_(scale)


def _cap(logits_CV: Tensor, softcap: float | None) -> Tensor:
    return logits_CV if softcap is None else (logits_CV / softcap).tanh_().mul_(softcap)


def _divided(logits_CV: Tensor, temperature: float) -> Tensor:
    return logits_CV if temperature == 1.0 else logits_CV.div_(temperature)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, not rounded to half precision on the way out (near -10, bfloat16 steps by 0.0625)."""
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
    """The weight as matrix products want it: CPUs have no half-precision product with a float32 result."""
    if weight_VD.is_cuda or weight_VD.dtype == torch.float64:
        return weight_VD
    return weight_VD.float()


def _chunks(num_rows: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]
