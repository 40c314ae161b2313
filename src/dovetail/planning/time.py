"""The seconds of a phase: the floor of the hardware times a measured efficiency.

Responsible for: work in FLOP and bytes, and the constants that turn it into seconds, each with the measurement that it
was fitted to. Not responsible for: what runs (plan.py), what processes send (traffic.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dovetail.planning.architecture import Shape
from dovetail.planning.hardware import Gpu
from dovetail.planning.memory import MAX_RUNNING, layer_elements

Parts = dict[str, float]
"""Name of a part -> seconds."""


@dataclass(frozen=True, slots=True)
class Constant:
    """A number fitted to a measurement."""

    value: float
    meaning: str
    fitted_to: str


FITTED = "the rows marked f"
READ = Constant(
    0.835, "share of the data sheet's bandwidth that decoding reaches", "decode steps of docs/performance.md"
)
LAYER = Constant(16e-6, "seconds of a layer of a decode step beside reading", "the same")
LAYER_ROW = Constant(0.07e-6, "and for each answer", "the same")
HEAD_NORMS = Constant(8e-6, "seconds of a layer's norms of heads in a decode step", FITTED)
ADAPTED = Constant(18e-6, "seconds of a layer's adapters in a decode step", FITTED)
ADAPTED_ROW = Constant(0.65e-6, "and for each answer", FITTED)
SWITCH = Constant(0.05, "seconds to begin and end a generation", FITTED)
SCORE = Constant(0.52, "share of the data sheet's TFLOP/s of products without gradient", FITTED)
SCORE_MOVED = Constant(2.5, "times that a pass without gradient moves a layer's activations", FITTED)
TRAIN = Constant(0.68, "share of the data sheet's TFLOP/s of products in gradient steps", FITTED)
TRAIN_MOVED = Constant(16.0, "times that a gradient step moves a layer's activations", FITTED)
SCORE_LAUNCH = Constant(0.8e-3, "seconds of the host for a layer without gradient", FITTED)
SCORE_LAUNCH_RMS = Constant(1.7e-3, "the same with RMS norms, rotary positions and gates", FITTED)
TRAIN_LAUNCH = Constant(2.4e-3, "seconds of the host for a layer of a gradient step", FITTED)
TRAIN_LAUNCH_RMS = Constant(5.5e-3, "the same with RMS norms, rotary positions and gates", FITTED)
UPDATE = Constant(
    0.87, "share of the data sheet's bandwidth that AdamW reaches", "optimiser steps, H100 and H200"
)
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """The passes without gradient of one model over a rollout."""

    role: str
    shape: Shape
    tokens: float
    length: float
    scored: float
    micro_batches: int


def scoring_parts(passes: Sequence[Pass], gpu: Gpu) -> Parts:
    """Return the seconds of passes without gradient by model.

    The host runs ahead, so that the phase takes the longer of its launches and the GPU's work.
    """
    parts, launches = Parts(), 0.0
    for one in passes:
        flop = forward_flop(one.shape, tokens=one.tokens, length=one.length, scored=one.scored)
        moved = SCORE_MOVED.value * activation_bytes_of_layers(one.shape, one.tokens)
        parts[f"{one.role} passes"] = (
            flop / (gpu.flop_per_second * SCORE.value) + moved / gpu.bytes_per_second
        )
        launch = SCORE_LAUNCH_RMS if one.shape.architecture.has_rms_norms else SCORE_LAUNCH
        launches += launch.value * one.shape.architecture.num_layers * one.micro_batches
    return parts | {"waiting for launches": max(0.0, launches - sum(parts.values()))}


def activation_bytes_of_layers(shape: Shape, tokens: float) -> float:
    """Return the bytes of what all layers keep of these tokens."""
    return 2 * layer_elements(shape.architecture) * shape.architecture.num_layers * tokens


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
    moved = TRAIN_MOVED.value + (SCORE_MOVED.value if step.is_checkpointed else 0.0)
    seconds = flop / (gpu.flop_per_second * TRAIN.value)
    seconds += moved * activation_bytes_of_layers(shape, step.tokens) / gpu.bytes_per_second
    launch = TRAIN_LAUNCH_RMS if shape.architecture.has_rms_norms else TRAIN_LAUNCH
    launches = launch.value * shape.architecture.num_layers * step.micro_batches
    parts = {f"{role} passes": seconds, f"{role} waiting for launches": max(0.0, launches - seconds)}
    if step.is_offloaded:
        parts[f"{role} weights from the host"] = 2 * step.micro_batches * step.weights / HOST_LINK.value
        parts[f"{role} update on the host"] = HOST_UPDATE.value * step.micro_batches * step.num_trained
        return parts
    updated = UPDATE_BYTES + (AVERAGE_BYTES if step.is_averaged else 0)
    parts[f"{role} update"] = updated * step.num_trained / (gpu.bytes_per_second * UPDATE.value)
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
    per_layer = LAYER.value + LAYER_ROW.value * together
    per_layer += HEAD_NORMS.value if shape.architecture.norms_heads else 0.0
    per_layer += ADAPTED.value + ADAPTED_ROW.value * together if work.rank else 0.0
    read = work.answers * work.prompt
    prompts = Pass(
        role="prompts", shape=shape, tokens=read, length=work.prompt, scored=work.answers, micro_batches=0
    )
    return {
        "reading prompts": sum(scoring_parts([prompts], gpu).values()) / work.split,
        "reading weights": tokens * work.weights / rate,
        "reading the KV cache": tokens
        * together
        * (work.prompt + work.new_tokens / 2)
        * work.cache_per_token
        / rate,
        "layers beside reading": tokens * layers * per_layer,
        "switching": SWITCH.value,
    }
