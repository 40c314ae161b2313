"""The memory of a process, item by item: what stays, and what each phase adds at its peak.

Responsible for: bytes of weights, optimiser states, gradients, activations, logits and the KV cache of one process. The
one model of memory: the planner adds the items up, and a run decides by the same functions what it must save.
Not responsible for: how large the models are (architecture.py), what is free (rlhf/build.py).

Letters: D width of the hidden states, Q of all query heads, K of all key heads, F of the feed-forward layer, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from dovetail.planning.architecture import Architecture

MASTER, MOMENTS, GRADIENT, AVERAGE = 4, 8, 4, 4
"""Bytes of one trained weight, all float32: its master copy, Adam's two moments, the accumulated gradient, and
its moving average."""
LOGITS_CHUNK_BYTES = 2**30
"""The size of one chunk of float32 logits on a GPU (model/linear_logprobs.py)."""
PAGE_TOKENS = 64
"""The tokens in a page of the KV cache. Smaller pages cost 7 to 15 % of GPU attention speed, larger waste memory."""
MAX_RUNNING = 256
"""The most answers that are decoded together."""
PREFILL_TOKENS = 8192
"""The most prompt tokens that are read in one forward."""
ARENA_SHARE = 0.8
"""The share of the free memory that the KV cache may take; the rest is for activations of the prefill."""
USABLE = 0.9
"""The share of free memory that a step may need by estimate; the rest is for fragments and what the estimate omits."""

SLACK = 1.03
"""The factor by which allocators reserve more than what is allocated, which alone is counted elsewhere."""

Items = Mapping[str, float]
"""Name of an item -> bytes."""


def layer_elements(of: Architecture, *, element_bytes: int = 2, is_frozen: bool = False) -> int:
    """Numbers that one layer keeps of one token for its backward pass, with attention that keeps no scores.

    Korthikanti et al. 2022 (arXiv:2205.05198), section 4.1, without dropout (whose masks are two of their 34 bytes)
    and without the 5 a s / h of stored scores (theirs is then 32 s b h bytes, 16 D numbers), for other shapes:

        norms and what they put out   2 D each  (RMSNorm: 4 D in units of two bytes, 3 D in float32; of heads likewise)
        queries, keys, values         Q + 2 K
        attention's output            Q
        feed-forward                  2 F, before and after the activation; gated: 4 F; ReLU: F

    is_frozen: adapters learn alone, and RMSNorms keep nothing for the gradient of their weights.

    Within 15 % of what autograd keeps for OPT, GPT-2, GPT-NeoX, Llama, Qwen2, Qwen3, Mistral, Phi-3 and Gemma 3. Gemma
    2's soft caps keep all scores of attention, which is more.
    """
    per_number = (4 if element_bytes == 2 else 3) - is_frozen if of.has_rms_norms else 2
    normed = of.num_norms * of.width + (of.query_width + of.key_width if of.norms_heads else 0)
    return per_number * normed + 2 * of.query_width + 2 * of.key_width + of.inner_copies * of.inner_width


def head_bytes(of: Architecture, *, tokens: int, element_bytes: int = 4, is_trained: bool = True) -> int:
    """Float32 logits of one chunk on a GPU and their slopes, and twice the head's: the sum and what is added.

    Slopes are in the weights' precision. A head that is frozen has no gradient. Without a head, nothing.
    """
    chunk = min(LOGITS_CHUNK_BYTES, 4 * tokens * of.vocabulary)
    gradient = 2 * 4 * of.vocabulary * of.width if is_trained else 0
    return chunk + chunk * element_bytes // 4 + gradient


def activation_bytes(
    of: Architecture, *, tokens: int, element_bytes: int, is_checkpointed: bool, rank: int = 0
) -> int:
    """Activations of a micro-batch at their peak, the head's included.

    With checkpointing each layer keeps its input alone, D numbers, and one layer at a time is computed again.
    rank: of adapters on all linear layers, whose head is frozen; 0 where all weights learn.
    """
    layer = layer_elements(of, element_bytes=element_bytes, is_frozen=rank > 0)
    kept = of.num_layers * of.width + layer if is_checkpointed else of.num_layers * layer
    ends = 3 * of.width  # the embedding, the last norm, what the head reads
    head = head_bytes(of, tokens=tokens, element_bytes=element_bytes, is_trained=rank == 0)
    return (kept + ends) * tokens * element_bytes + head


def state_items(num_trained: float, *, element_bytes: int, is_averaged: bool) -> dict[str, float]:
    """Bytes of what the optimiser and the average hold of so many trained weights."""
    masters = {"master weights": MASTER * num_trained} if element_bytes == 2 else {}
    average = {"moving average": AVERAGE * num_trained} if is_averaged else {}
    return {**masters, "moments": MOMENTS * num_trained, **average}


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """One model of a run as each process holds it."""

    role: str
    architecture: Architecture
    """Its shapes; the vocabulary is 0 if it has a scalar head."""
    num_weights: float
    """All weights, adapters included."""
    num_trained: float = 0.0
    """Those that learn."""
    rank: int = 0
    """The rank of its adapters; 0 without."""
    element_bytes: int = 2
    stage: int = 0
    """The ZeRO stage; 0 where each process has all."""
    shard_size: int = 1
    """The processes that hold one copy."""
    is_offloaded: bool = False
    is_averaged: bool = False

    @property
    def num_shards(self) -> int:
        """The parts into which weights and states are cut."""
        return self.shard_size if self.stage else 1

    @property
    def weights(self) -> float:
        """Bytes of the whole model."""
        return self.num_weights * self.element_bytes

    @property
    def is_gathered(self) -> bool:
        """Return whether a pass needs other weights than those that stay on the device."""
        return self.stage > 0 and (self.num_shards > 1 or self.is_offloaded)

    def resident(self) -> dict[str, float]:
        """Bytes of what stays on the device: weights or shards of them."""
        return {} if self.is_offloaded else {f"{self.role} weights": self.weights / self.num_shards}

    def states(self) -> dict[str, float]:
        """Bytes of optimiser states and average that are on the device."""
        if self.is_offloaded or not self.num_trained:
            return {}
        trained = self.num_trained / self.num_shards
        items = state_items(trained, element_bytes=self.element_bytes, is_averaged=self.is_averaged)
        return {f"{self.role} {name}": size for name, size in items.items()}

    def on_host(self) -> dict[str, float]:
        """Bytes of what an offloaded model keeps in the host's memory, float32 gradients included."""
        if not self.is_offloaded:
            return {}
        trained = self.num_trained / self.num_shards
        items = state_items(trained, element_bytes=self.element_bytes, is_averaged=self.is_averaged)
        gradients = {"gradients": GRADIENT * trained} if trained else {}
        every = {"weights": self.weights / self.num_shards, **items, **gradients}
        return {f"{self.role} {name}": size for name, size in every.items()}

    def gathered(self) -> dict[str, float]:
        """Bytes of the weights that a pass brings to the device: all, or at stage 3 two layers."""
        if not self.is_gathered:
            return {}
        whole = self.weights * (2 / self.architecture.num_layers if self.stage == 3 else 1)
        kept = 0.0 if self.is_offloaded or self.stage == 3 else self.weights / self.num_shards
        return {f"{self.role} weights, gathered": whole - kept}

    def training(self, tokens: int, micro_batches: int, *, is_checkpointed: bool) -> dict[str, float]:
        """Bytes that a gradient step adds at its peak.

        Gradients are held in the weights' precision after one micro-batch, and in float32 once they are a sum. They
        grow as activations shrink, so the peak is at one end of a backward pass: at its beginning with the sum of the
        micro-batches before, or at its end with one layer's activations.
        """
        activations = activation_bytes(
            self.architecture,
            tokens=tokens,
            element_bytes=self.element_bytes,
            is_checkpointed=is_checkpointed,
            rank=self.rank,
        )
        here = self.num_trained / (1 if self.stage == 1 else self.num_shards)
        first = here * (0 if self.is_offloaded and self.stage != 1 else self.element_bytes)
        summed = here * (0 if self.is_offloaded and self.stage != 1 else GRADIENT)
        last = activations / self.architecture.num_layers
        before = {1: 0.0, 2: first}.get(micro_batches, summed)
        ends = ((before, activations), (first if micro_batches == 1 else summed, last))
        gradients, kept = max(ends, key=sum)
        return {**self.gathered(), f"{self.role} gradients": gradients, f"{self.role} activations": kept}

    def forward(self, tokens: int) -> dict[str, float]:
        """Bytes that a pass without gradients adds: one layer's numbers and a chunk of logits."""
        head = head_bytes(self.architecture, tokens=tokens, element_bytes=0, is_trained=False)
        of = self.architecture
        layer = (4 * of.width + max(of.query_width + 2 * of.key_width, 2 * of.inner_width)) * tokens
        return {
            **self.gathered(),
            f"{self.role} activations": layer * self.element_bytes,
            "logits": float(head),
        }


def needed_bytes(models: Sequence[Held], *, tokens: int) -> float:
    """Return what training needs beside the weights: the states of all models, and one pass of the largest.

    tokens: of a micro-batch, of which there are several.
    """
    states = sum(total(model.states()) for model in models)
    return states + max(total(model.training(tokens, 3, is_checkpointed=False)) for model in models)


def cache_bytes(of: Architecture, *, tokens: int, element_bytes: int, split: int = 1) -> int:
    """Bytes of the keys and values of one answer with its prompt, in whole pages; split: processes that share them."""
    pages = -(-tokens // PAGE_TOKENS)
    return pages * PAGE_TOKENS * of.num_layers * 2 * (of.key_width // split) * element_bytes


def prefill_bytes(of: Architecture, *, tokens: int, answers: int, element_bytes: int) -> int:
    """Bytes of reading prompts, `tokens` at most at a time, and of the logits that the answers are drawn from."""
    read = min(PREFILL_TOKENS, tokens)
    layer = (4 * of.width + max(of.query_width + 2 * of.key_width, 2 * of.inner_width)) * read * element_bytes
    return layer + 2 * 4 * min(MAX_RUNNING, answers) * of.vocabulary


def total(*parts: Items) -> float:
    """Add up the bytes of all items."""
    return sum(sum(part.values()) for part in parts)


def merged(parts: Iterable[Items]) -> dict[str, float]:
    """Put items together; those of one name are added up."""
    found: dict[str, float] = {}
    for part in parts:
        for name, size in _named(part):
            found[name] = found.get(name, 0.0) + size
    return found


def _named(part: Items) -> Iterator[tuple[str, float]]:
    return ((name, size) for name, size in part.items() if size > 0)
