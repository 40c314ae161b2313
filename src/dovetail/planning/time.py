"""The seconds of a phase: the floor of the hardware times a measured efficiency.

Responsible for: work in FLOP and bytes, and the constants that turn it into seconds, each with the measurement that it
was fitted to. Not responsible for: what runs (plan.py), what processes send (traffic.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dovetail.planning.architecture import Shape
from dovetail.planning.hardware import Gpu
from dovetail.planning.memory import MAX_RUNNING

Parts = dict[str, float]
"""Name of a part -> seconds."""


@dataclass(frozen=True, slots=True)
class Constant:
    """A number fitted to a measurement."""

    value: float
    meaning: str
    fitted_to: str


READ = Constant(0.835, "share of the data sheet's bandwidth that decoding reaches", "decode steps, H200")
LAYER = Constant(16e-6, "seconds of a layer of a decode step beside reading", "decode steps, H200")
ROW = Constant(0.07e-6, "seconds of a layer and answer of a decode step beside reading", "decode steps, H200")
ADAPTED = Constant(14e-6, "seconds of a layer's adapters in a decode step", "PPO step OPT-13B LoRA, H200")
SCORE = Constant(0.52, "share of the data sheet's TFLOP/s in passes without gradient", "PPO step, H200")
TRAIN = Constant(0.54, "share of the data sheet's TFLOP/s in gradient steps", "PPO step, H200")
LAUNCH_FORWARD = Constant(
    0.13e-3, "seconds of the host for a layer's forward pass", "PPO step OPT-350M, H200"
)
LAUNCH_TRAIN = Constant(0.5e-3, "seconds of the host for a layer's forward and backward pass", "the same")
UPDATE = Constant(
    0.87, "share of the data sheet's bandwidth that AdamW reaches", "optimiser step, H200 and H100"
)
SWITCH = Constant(0.05, "seconds to begin and end a generation", "PPO step, H200")
HOST_UPDATE = Constant(
    0.59e-9, "seconds of the host for a weight and micro-batch with offload", "OPT-6.7B, H100"
)
HOST_LINK = Constant(50e9, "bytes a second between a GPU and host memory", "stated: PCIe 5")
UPDATE_BYTES, AVERAGE_BYTES = 28, 12
"""Bytes that AdamW and the moving average move for each trained weight."""


def forward_flop(shape: Shape, *, tokens: float, length: float, scored: float) -> float:
    """Count the products of a pass over sequences of a length. scored: tokens whose logits are computed."""
    return (
        2 * shape.layer_products * tokens
        + attention_flop(shape, tokens, length)
        + 2 * shape.head_products * scored
    )


def attention_flop(shape: Shape, tokens: float, length: float) -> float:
    """Count the products of causal attention: two for each earlier token and number of the heads."""
    return 2 * tokens * length * shape.architecture.query_width * shape.architecture.num_layers


def training_flop(
    shape: Shape, *, tokens: float, length: float, scored: float, rank: int, is_checkpointed: bool
) -> float:
    """Count the products of a gradient step.

    Backward takes two products for each of forward, of frozen weights one, and adapters their own three. The head
    computes its logits twice. Checkpointing computes all layers once more.
    """
    layers = 2 * shape.layer_products * tokens
    attention = attention_flop(shape, tokens, length)
    head = 2 * shape.head_products * scored * (3 if rank else 4)
    adapters = 6 * shape.num_adapter_weights(rank) * tokens if rank else 0
    again = layers + attention if is_checkpointed else 0
    return layers * (2 if rank else 3) + 3.5 * attention + head + adapters + again


def scoring_seconds(
    shape: Shape, gpu: Gpu, *, tokens: float, length: float, scored: float, micro_batches: int
) -> float:
    """Return the seconds of passes without gradient, bound by products or by the host's launches."""
    flop = forward_flop(shape, tokens=tokens, length=length, scored=scored)
    launches = LAUNCH_FORWARD.value * shape.architecture.num_layers * micro_batches
    return max(flop / (gpu.flop_per_second * SCORE.value), launches)


@dataclass(frozen=True, slots=True, kw_only=True)
class Learning:
    """One gradient step of a process."""

    tokens: float
    length: float
    scored: float
    micro_batches: int
    rank: int = 0
    is_checkpointed: bool = False
    num_trained: float = 0.0
    """The weights that this process updates."""
    is_averaged: bool = False
    is_offloaded: bool = False
    weights: float = 0.0
    """Bytes of the weights that come from the host in each pass, if it is offloaded."""


def training_parts(shape: Shape, gpu: Gpu, step: Learning, *, role: str) -> Parts:
    """Return the seconds of a gradient step by part."""
    flop = training_flop(
        shape, tokens=step.tokens, length=step.length, scored=step.scored, rank=step.rank,
        is_checkpointed=step.is_checkpointed,
    )  # fmt: skip
    launches = LAUNCH_TRAIN.value * shape.architecture.num_layers * step.micro_batches
    parts = {f"{role} passes": max(flop / (gpu.flop_per_second * TRAIN.value), launches)}
    if step.is_offloaded:
        parts[f"{role} weights from the host"] = 2 * step.micro_batches * step.weights / HOST_LINK.value
        parts[f"{role} update on the host"] = HOST_UPDATE.value * step.micro_batches * step.num_trained
        return parts
    moved = UPDATE_BYTES + (AVERAGE_BYTES if step.is_averaged else 0)
    parts[f"{role} update"] = moved * step.num_trained / (gpu.bytes_per_second * UPDATE.value)
    return parts


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """The answers of one group of processes that holds a copy of the actor."""

    answers: int
    prompt: int
    new_tokens: int
    weights: float
    """Bytes of the weights that a token reads in each process."""
    cache_per_token: float
    """Bytes of keys and values of a token in each process."""
    running: int = MAX_RUNNING
    """The answers that run at once."""
    rank: int = 0
    split: int = 1


def generation_parts(shape: Shape, gpu: Gpu, work: Generation) -> Parts:
    """Return the seconds of generating by part. Each token of the running answers reads all weights and their cache."""
    rounds = math.ceil(work.answers / work.running)
    together = work.answers / rounds
    rate = gpu.bytes_per_second * READ.value
    tokens = rounds * work.new_tokens
    layers = shape.architecture.num_layers
    per_layer = LAYER.value + ROW.value * together + (ADAPTED.value if work.rank else 0.0)
    read = work.answers * work.prompt
    prompts = forward_flop(shape, tokens=read, length=work.prompt, scored=work.answers) / work.split
    return {
        "reading prompts": prompts / (gpu.flop_per_second * SCORE.value),
        "reading weights": tokens * work.weights / rate,
        "reading the KV cache": tokens
        * together
        * (work.prompt + work.new_tokens / 2)
        * work.cache_per_token
        / rate,
        "layers beside reading": tokens * layers * per_layer,
        "switching": SWITCH.value,
    }
