"""A model small enough to check by hand, its loss, and batches for it."""

import math

import torch
from torch import Tensor, nn

from dovetail.batches import PackedBatch, SummedLoss, pack
from dovetail.training.optim import Optimizer, build_optimizer
from dovetail.training.step import StepReport, Term, TokenBudget, gradient_step

VOCABULARY = 11
LENGTHS = (7, 3, 9, 2, 5, 4)


class Toy(nn.Module):
    """Predicts a token from the one before it; has a norm, biases and a head called `score`."""

    def __init__(self, *, seed: int = 0, dtype: torch.dtype = torch.float32, width: int = 8) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.norm = nn.LayerNorm(width)
        self.layer = nn.Linear(width, width)
        self.score = nn.Linear(width, VOCABULARY, bias=False)
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            parameter.data.normal_(0.0, 0.5, generator=generator)
        self.to(dtype)

    def forward(self, ids_T: Tensor) -> Tensor:
        return self.score(torch.tanh(self.layer(self.norm(self.embedding(ids_T)))))


def loss_of(model: nn.Module, micro: PackedBatch) -> SummedLoss:
    """-log p of the marked tokens, summed, in float32 or better; one more sum beside it."""
    logits_TV = model(micro.token_ids_T[:-1])
    wide = logits_TV if logits_TV.dtype == torch.float64 else logits_TV.float()
    logprobs_T = wide.log_softmax(-1).gather(-1, micro.token_ids_T[1:, None]).squeeze(-1)
    kept_T = logprobs_T[micro.mask_T[1:]]
    return SummedLoss(-kept_T.sum(), micro.mask_T.sum(), {"unlikely": (kept_T < -3.0).sum()})


def toy_batch(seed: int = 0, lengths: tuple[int, ...] = LENGTHS) -> PackedBatch:
    """Random tokens; about two thirds of them count, and not equally many in each sequence."""
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(0, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]
    masks = [(torch.rand(n, generator=generator) < 0.7).tolist() for n in lengths]
    masks[0][-1] = True
    return pack(ids, masks)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def step(
    model: nn.Module,
    terms: list[Term],
    *,
    budget: int | TokenBudget = 1000,
    optimizer: Optimizer | None = None,
    max_grad_norm: float = math.inf,
) -> StepReport:
    """One gradient step on the CPU, at a rate of 0.01."""
    return gradient_step(
        model,
        optimizer or build_optimizer(model, learning_rate=0.1),
        terms,
        max_grad_norm=max_grad_norm,
        budget=TokenBudget(budget) if isinstance(budget, int) else budget,
        device=torch.device("cpu"),
        learning_rate=0.01,
    )
