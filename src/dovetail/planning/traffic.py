"""The traffic of a process: what it receives from others, in bytes and seconds.

Responsible for: the bytes of each collective of a PPO step, which tests/parallel/test_communication.py counts in real
steps, and the seconds of rings over links whose speed is stated, not measured.
Not responsible for: the seconds of computing (time.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dovetail.planning.hardware import Gpu

OF_LINK = 0.8
"""The share of a link that a collective reaches; stated, not measured."""
HOP_IN_NODE, HOP_BETWEEN_NODES = 1e-6, 5e-6
"""Seconds that a ring's first byte takes from GPU to GPU; stated, not measured."""


@dataclass(frozen=True)
class Exchanged:
    """One model as far as processes exchange it."""

    weights: float
    """Bytes of all weights."""
    gradients: float = 0.0
    """Bytes of the gradients of those that are trained, in float32."""
    stage: int = 0


@dataclass(frozen=True)
class Work:
    """A step, as far as communication knows it; one update per rollout."""

    processes: int
    actor: Exchanged
    critic: Exchanged
    reward: Exchanged
    reference: Exchanged | None
    """None: the actor without its adapters."""
    micro_batches: int
    """The micro-batches of each pass, in each process."""
    tokens: int
    """The tokens of all prompts and answers."""
    scores_actor: bool = False
    """Old log-probabilities come from a scoring pass of the actor."""
    shard_size: int | None = None
    """Processes that hold one copy of what is sharded; None: all."""

    def share(self, model: Exchanged) -> float:
        """Return what a ring through those who hold one copy brings each of a whole tensor."""
        return ring_share(self.shard_size or self.processes if model.stage else self.processes)

    def across(self, model: Exchanged) -> float:
        """Return the bytes of a gradient step that come from the other copies: of each process's own rows, once."""
        size = self.shard_size or self.processes
        return 2 * ring_share(self.processes // size) * model.gradients / size if model.stage else 0.0


def received(work: Work) -> dict[str, float]:
    """Return the bytes that each process receives, by purpose. Left out: the answers themselves, and single numbers."""
    m = work.micro_batches
    passes = [work.reference or work.actor, work.critic, work.reward]
    columns = 2
    if work.scores_actor:
        passes.append(work.actor)
        columns += 2
    return {
        "gather for generation": work.share(work.actor) * work.actor.weights if work.actor.stage else 0.0,
        "gather for scoring": sum(work.share(model) * gathered(model, m) for model in passes),
        "log-probabilities and values": 2 * ring_share(work.processes) * columns * 4 * work.tokens,
        "gradient steps": sum(work.share(model) * stepped(model, m) for model in (work.actor, work.critic)),
        "gradients of other copies": work.across(work.actor) + work.across(work.critic),
    }


def ring_share(processes: int) -> float:
    """Return what a ring brings each process of a whole tensor."""
    return (processes - 1) / processes


def gathered(model: Exchanged, micro_batches: int) -> float:
    """Return the bytes gathered in a pass without gradients: once at stages 1 and 2, per micro-batch at stage 3."""
    return model.weights * {0: 0, 1: 1, 2: 1, 3: micro_batches}[model.stage]


def stepped(model: Exchanged, micro_batches: int) -> float:
    """Return the bytes gathered and reduced in a gradient step within one copy; an all-reduce counts twice."""
    return {
        0: 2 * model.gradients,
        1: model.weights + model.gradients,
        2: micro_batches * (model.weights + model.gradients),
        3: micro_batches * (2 * model.weights + model.gradients),
    }[model.stage]


def ring_seconds(num_bytes: float, gpu: Gpu, *, gpus: int, per_node: int, collectives: int) -> float:
    """Return the seconds in which rings bring each GPU what it lacks, by the slower of the links they cross.

    A ring enters a node through the links of all its GPUs, each a part of it.
    """
    if gpus == 1:
        return 0.0
    nodes = math.ceil(gpus / per_node)
    link = gpu.link if nodes == 1 else min(gpu.link, gpu.network * per_node)
    latency = (gpus - nodes) * HOP_IN_NODE + (nodes if nodes > 1 else 0) * HOP_BETWEEN_NODES
    return num_bytes * ring_share(gpus) / (link * 1e9 * OF_LINK) + collectives * latency


def sum_seconds(gpu: Gpu, *, num_bytes: float, processes: int, layers: int) -> float:
    """Return the seconds of the two all-reduces of each layer that tensor parallelism takes for one token of each
    running answer. num_bytes: of their hidden states."""
    if processes == 1:
        return 0.0
    moved = 2 * ring_share(processes) * num_bytes
    return 2 * layers * (moved / (gpu.link * 1e9 * OF_LINK) + 2 * (processes - 1) * HOP_IN_NODE)
