"""A model that learns, written out: Hugging Face's own forward over padded batches, and an AdamW of a dozen lines.

It shares no code with the package. Everything is float64; an adapter is a matrix that is added to a weight.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.func import functional_call
from transformers import PreTrainedModel

from dovetail.config.model import LoraConfig
from dovetail.config.stages import OptimizerConfig

Row = tuple[list[int], list[bool]]
"""Token ids of a text, and which of them are learnt."""
PEFT = "base_model.model."
"""What peft puts before each name."""


def float32(number: float) -> float:
    """The nearest number of single precision, in which a rollout keeps scores and what the generator says."""
    return float(torch.tensor(number, dtype=torch.float32))


def rate(step: int, settings: OptimizerConfig, total_steps: int) -> float:
    """The learning rate of a step, from 0."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    x = (step - settings.warmup_steps) / (total_steps - settings.warmup_steps)
    shapes = {"constant": 1.0, "linear": 1 - x, "cosine": 0.5 + 0.5 * math.cos(math.pi * x)}
    if settings.schedule == "constant":
        return settings.learning_rate
    low = settings.learning_rate * settings.final_fraction
    return low + (settings.learning_rate - low) * shapes[settings.schedule]


class Learner:
    """A model that learns, with an AdamW (Loshchilov and Hutter 2019, algorithm 2) of its own.

    lora, adapters: with these, the weights that learn as a run drew them, under peft's names, and the rest stays.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        settings: OptimizerConfig,
        lora: LoraConfig | None = None,
        adapters: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.model = model
        self.settings = settings
        self.frozen = {name: p.detach().double() for name, p in model.named_parameters()}
        learning: Mapping[str, Tensor] = self.frozen
        if lora is not None:
            assert adapters is not None
            expect_adapters(adapters, lora)
            self.scale, learning = lora.alpha / lora.rank, adapters
        self.trained = {name: w.detach().double().clone().requires_grad_() for name, w in learning.items()}
        self.moments = {name: (torch.zeros_like(w), torch.zeros_like(w)) for name, w in self.trained.items()}
        self.steps = 0

    def weights(self, trained: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """All weights under Hugging Face's names, with what the adapters add."""
        trained = self.trained if trained is None else trained
        weights = dict(self.frozen)
        for name, weight in trained.items():
            plain = name.removeprefix(PEFT).replace("modules_to_save.default.", "")
            if ".lora_A." in name:
                layer = plain.partition(".lora_A.")[0] + ".weight"
                other = trained[name.replace(".lora_A.", ".lora_B.")]
                weights[layer] = weights[layer] + self.scale * (other @ weight)
            elif ".lora_B." not in name:
                weights[plain] = weight
        return weights

    def hidden(self, sequences: Sequence[Sequence[int]], weights: Mapping[str, Tensor]) -> Tensor:
        """Hidden states [sequence, place, width] of a batch that is padded on the right."""
        longest = max(map(len, sequences))
        ids = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in sequences])
        mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in sequences])
        start = self.model.base_model_prefix + "."
        inner = {n.removeprefix(start): w for n, w in weights.items() if n.startswith(start)}
        given = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
        output = functional_call(self.model.base_model, inner, (), given)
        return output.last_hidden_state

    def logprobs(self, sequences: Sequence[Sequence[int]], temperature: float) -> list[list[Tensor]]:
        """log p of each token but the first, given those before it."""
        weights = self.weights()
        logits = self.hidden(sequences, weights) @ weights["lm_head.weight"].T / temperature
        table = logits - torch.logsumexp(logits, dim=-1, keepdim=True)
        return [[table[row, t - 1, ids[t]] for t in range(1, len(ids))] for row, ids in enumerate(sequences)]

    def numbers(self, sequences: Sequence[Sequence[int]]) -> list[list[Tensor]]:
        """The scalar head at each token."""
        weights = self.weights()
        table = self.hidden(sequences, weights) @ weights["score.weight"][0]
        return [[table[row, t] for t in range(len(ids))] for row, ids in enumerate(sequences)]

    def step(self, loss: Tensor, learning_rate: float) -> float:
        """One step of AdamW on the clipped gradient; returns the norm before clipping."""
        gradients = torch.autograd.grad(loss, list(self.trained.values()))
        norm = math.sqrt(sum(float((gradient**2).sum()) for gradient in gradients))
        shrink = min(1.0, self.settings.max_grad_norm / (norm + 1e-6))
        self.steps += 1
        (beta1, beta2), t = self.settings.betas, self.steps
        with torch.no_grad():
            for (name, weight), gradient in zip(self.trained.items(), gradients, strict=True):
                first, second = self.moments[name]
                first.copy_(beta1 * first + (1 - beta1) * shrink * gradient)
                second.copy_(beta2 * second + (1 - beta2) * (shrink * gradient) ** 2)
                if weight.ndim == 2 and "score" not in name:
                    weight -= learning_rate * self.settings.weight_decay * weight
                sizes = (second / (1 - beta2**t)).sqrt() + self.settings.eps
                weight -= learning_rate * first / (1 - beta1**t) / sizes
        return norm


def expect_adapters(adapters: Mapping[str, Tensor], lora: LoraConfig) -> None:
    """They are of the rank that was asked for, on the layers that were named."""
    first = {name: weight for name, weight in adapters.items() if ".lora_A." in name}
    assert {weight.shape[0] for weight in first.values()} == {lora.rank}
    if lora.target_modules != "all-linear":
        layers = {name.partition(".lora_A.")[0].rpartition(".")[2] for name in first}
        assert layers == set(lora.target_modules)
