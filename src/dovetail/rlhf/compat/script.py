"""The small parts that the predecessor's script takes from its own package.

Responsible for: `MiniDataset`, `ExponentialMovingAverage`, the tokenizer, seeds, devices and printed lines.
Not responsible for: models, data sets, learning.
"""

import random
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from dovetail.rlhf.compat.processes import is_rank_0
from dovetail.telemetry.log import say
from dovetail.text.tokenizer import load_tokenizer


class MiniDataset:
    """A collection of batches that is returned in smaller ones."""

    def __init__(self, max_size: int, small_batch_size: int) -> None:
        self.dataset: list[Any] = []
        self.max_size = max_size
        self.small_batch_size = small_batch_size

    def add(self, data: Any) -> list[Any] | None:
        """Keep `data`; when `max_size` batches are there, return them all in small ones and start anew.

        A dictionary, or a list of columns, is cut row by row; anything else along its first dimension.
        """
        if len(self.dataset) >= self.max_size:
            raise ValueError("the collection is full: use what `add` returned before adding more")
        self.dataset.append(data)
        if len(self.dataset) < self.max_size:
            return None
        small = [part for large in self.dataset for part in self._parts(large)]
        self.free()
        return small

    def free(self) -> None:
        """Forget what was collected."""
        self.dataset = []

    def _parts(self, large: Any) -> list[Any]:
        size = self.small_batch_size
        if isinstance(large, Mapping):
            length = len(next(iter(large.values())))
            return [{k: v[i : i + size] for k, v in large.items()} for i in range(0, length, size)]
        if isinstance(large, list | tuple):
            return [[column[i : i + size] for column in large] for i in range(0, len(large[0]), size)]
        return [large[i : i + size] for i in range(0, len(large), size)]


class ExponentialMovingAverage:
    """A running mean in which older numbers weigh less."""

    def __init__(self, alpha: float = 0.9) -> None:
        self.alpha = alpha
        self.ema: float | None = None

    def update(self, num: float) -> float:
        """Add a number and return the mean; the first number is the mean."""
        self.ema = num if self.ema is None else self.alpha * self.ema + (1.0 - self.alpha) * num
        return self.ema

    def get(self) -> float:
        """Return the mean, 0 before any number."""
        return 0.0 if self.ema is None else self.ema


def load_hf_tokenizer(
    model_name_or_path: str, fast_tokenizer: bool = True, add_special_tokens: str | list[str] | None = None
) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a model, with a pad token, and with further special tokens if asked for."""
    tokenizer = load_tokenizer(model_name_or_path)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if add_special_tokens is not None:
        names = [add_special_tokens] if isinstance(add_special_tokens, str) else add_special_tokens
        tokenizer.add_tokens(names, special_tokens=True)
    return tokenizer


def set_random_seed(seed: int | None) -> None:
    """Seed Python, numpy and torch; the engine draws answers from `args.seed` alone."""
    if seed is not None:
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)


def to_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Return the batch with its tensors on the device, all else as it is."""
    return {name: value.to(device) if hasattr(value, "to") else value for name, value in batch.items()}


def print_rank_0(msg: object, rank: int | None = None) -> None:
    """Print in the first process: by its `rank`, or by its place in the group if none is given."""
    if rank <= 0 if rank is not None else is_rank_0():
        say(str(msg))


def print_throughput_step3(
    actor_model: Any,
    critic_model: Any,
    args: Namespace,
    e2e_time: float,
    gen_exp_time: float,
    train_time: float,
    rank: int = 0,
) -> None:
    """Print the seconds of a step, and this process's answers per second."""
    answers = args.per_device_generation_batch_size * args.generation_batches
    print_rank_0(
        f"step: {e2e_time:.2f} s, of them generating {gen_exp_time * args.generation_batches:.2f}, training "
        f"{train_time:.2f}; {answers / e2e_time:.2f} answers a second and process",
        rank,
    )
