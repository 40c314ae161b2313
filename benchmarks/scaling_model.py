"""What a PPO step receives from other processes, and how long it takes on 1 to 512 GPUs, by arithmetic.

    python benchmarks/scaling_model.py          the table of docs/scaling.md

`received` is exact: tests/parallel/test_communication.py counts the collectives of real steps. The seconds are a model
of H100s from efficiencies measured on one (docs/performance.md) and from the link speeds below, which nobody measured
here. Everything is trained; prompt and answer have 256 tokens each; critic and reward model have 331 million weights;
a rollout has 1,024 answers on any number of GPUs.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

# Measured on one H100: OPT-1.3B with OPT-350M, batches of 64 and 256; a device copy.
BYTES_PER_SECOND = 3.02e12
OF_DECODING_FLOOR, LAYER_OVERHEAD = 0.75, 32e-6
"""Decoding against reading weights and cache once a token at the rate of a copy; seconds per layer and token beside."""
SCORING_FLOPS = 422e12
TRAINING_FLOPS = 473e12
OPTIMISER_BYTES = 28 / 2.8e12 * BYTES_PER_SECOND
"""Per weight, as if moved at the rate of a copy."""

# Stated, not measured.
GPUS_PER_NODE = 8
NVLINK = 450e9
"""Bytes per second and direction of a GPU."""
NETWORK = 50e9
"""Of one of as many 400 Gb/s links as a node has GPUs. A ring enters a node through all of them, each a part of it."""
OF_LINK = 0.8
"""What a collective reaches of a link."""
HOP_IN_NODE, HOP_BETWEEN_NODES = 1e-6, 5e-6
"""Seconds that a ring's first byte takes from GPU to GPU."""
HOST_LINK = 50e9
"""Bytes per second between a GPU and its host's memory."""

MEMORY = 76e9
"""Bytes of a GPU that can be used."""
SEQUENCES, PROMPT, ANSWER = 1024, 256, 256
RUNNING = 256
"""Answers that are generated together on one replica, at most."""


@dataclass(frozen=True)
class Held:
    """One model as the processes hold it."""

    weights: float
    """Bytes of all weights."""
    gradients: float = 0.0
    """Bytes of the gradients of those that are trained, in float32."""
    stage: int = 0


@dataclass(frozen=True)
class Work:
    """A step, as far as communication knows it; one update per rollout."""

    processes: int
    actor: Held
    critic: Held
    reward: Held
    reference: Held | None
    """None: the actor without its adapters."""
    micro_batches: int
    """Of each pass, in each process."""
    tokens: int
    """Of all prompts and answers."""
    scores_actor: bool = False
    """Old log-probabilities come from a scoring pass of the actor."""
    shard_size: int | None = None
    """Processes that hold one copy of what is sharded; None: all."""

    def share(self, model: Held) -> float:
        """What a ring through those who hold one copy brings each of a whole tensor."""
        return ring_share(self.shard_size or self.processes if model.stage else self.processes)

    def across(self, model: Held) -> float:
        """Bytes of a gradient step that come from the other copies: of each process's own rows, once."""
        size = self.shard_size or self.processes
        return 2 * ring_share(self.processes // size) * model.gradients / size if model.stage else 0.0


def received(work: Work) -> dict[str, float]:
    """Bytes that each process receives, by what they are for. Left out: the answers themselves, and single numbers."""
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
    """What a ring brings each process of a whole tensor."""
    return (processes - 1) / processes


def gathered(model: Held, micro_batches: int) -> float:
    """Bytes of weights gathered in a pass without gradients: once at stages 1 and 2, per micro-batch at stage 3."""
    return model.weights * {0: 0, 1: 1, 2: 1, 3: micro_batches}[model.stage]


def stepped(model: Held, micro_batches: int) -> float:
    """Bytes gathered and reduced in a gradient step within one copy; an all-reduce counts twice."""
    return {
        0: 2 * model.gradients,
        1: model.weights + model.gradients,
        2: micro_batches * (model.weights + model.gradients),
        3: micro_batches * (2 * model.weights + model.gradients),
    }[model.stage]


@dataclass(frozen=True)
class Actor:
    """An OPT model in bf16."""

    name: str
    width: int
    layers: int
    micro_tokens: int
    """Of one forward and backward pass of a GPU."""
    is_checkpointed: bool = True
    published: tuple[tuple[int, float], ...] = ()
    """(GPUs, sequences per second) of DeepSpeed-Chat on A100 80GB."""

    @property
    def weights(self) -> float:
        return 12 * self.layers * self.width**2 + 50272 * self.width

    @property
    def stage(self) -> int:
        """ZeRO stage: 3 unless a GPU has room for all."""
        return 3 if self.weights > 2e9 else 1

    @property
    def cache_bytes(self) -> float:
        """Of a whole sequence's keys and values."""
        return 2 * 2 * self.layers * self.width * (PROMPT + ANSWER)


ACTORS = (
    Actor("OPT-1.3B", 2048, 24, 16384, is_checkpointed=False, published=((1, 6.27), (8, 52.4), (64, 142.0))),
    Actor("OPT-13B", 5120, 40, 16384, published=((1, 0.624), (8, 8.16), (64, 58.7))),
    Actor("OPT-66B", 9216, 64, 8192, published=((8, 1.46), (64, 9.79))),
    Actor("OPT-175B", 12288, 96, 8192, published=((64, 3.67),)),
)
SMALL = 331e6
"""Weights of the critic, and of the reward model."""


@dataclass(frozen=True)
class Step:
    """Seconds of a step's phases."""

    gpus: int
    sequences: int
    generate: float
    gather: float
    """Into generation, and out of it; with the optimiser's way to the host and back where that makes room."""
    score: float
    train: float
    tensor_parallel: int
    """GPUs that hold one replica for generation."""
    is_parked: bool
    is_network_bound: bool
    """Training waits for the network."""

    @property
    def seconds(self) -> float:
        return self.generate + self.gather + self.score + self.train

    @property
    def rate(self) -> float:
        """Sequences per second."""
        return self.sequences / self.seconds


def step_of(actor: Actor, gpus: int, sequences: int = SEQUENCES) -> Step | None:
    """The fastest way to take a step that fits; None if there is none."""
    ways = product((t for t in (1, 2, 4, 8) if t <= gpus), (False, True))
    found = [_step(actor, gpus, sequences, tensor_parallel, is_parked) for tensor_parallel, is_parked in ways]
    return min((step for step in found if step is not None), key=lambda step: step.seconds, default=None)


def _step(
    actor: Actor, gpus: int, sequences: int, tensor_parallel: int, is_parked: bool
) -> Step | None:  # fmt: skip
    tokens = sequences * (PROMPT + ANSWER) / gpus
    micro = min(actor.micro_tokens, tokens)
    m = math.ceil(tokens / micro)
    held = Held(2 * actor.weights, 4 * actor.weights, actor.stage)
    states = 16 * actor.weights / gpus  # float32 masters, two moments, moving average
    resident = 2 * actor.weights / gpus + 2 * actor.weights / (
        gpus if actor.stage == 3 else 1
    )  # and the reference
    if resident + states + 4 * actor.weights / gpus + _working_bytes(actor, micro) > MEMORY:
        return None
    room = MEMORY - resident - (0 if is_parked else states) - held.weights / tensor_parallel
    generate = _generate(actor, math.ceil(sequences * tensor_parallel / gpus), tensor_parallel, room)
    if generate is None:
        return None
    gather = _ring(held.weights, gpus, actor.layers)  # whole layers, from which each cuts its slices
    gather += 2 * states / HOST_LINK if is_parked else 0.0
    reference = Held(held.weights, stage=3 if actor.stage == 3 else 0)
    score = max(
        2 * tokens * actor.weights / SCORING_FLOPS, _ring(gathered(reference, m), gpus, m * actor.layers)
    )
    score += 4 * tokens * SMALL / SCORING_FLOPS
    compute = (8 if actor.is_checkpointed else 6) * tokens * actor.weights / TRAINING_FLOPS
    communication = _ring(stepped(held, m), gpus, (3 * m if actor.stage == 3 else 2) * actor.layers)
    critic = 6 * tokens * SMALL / TRAINING_FLOPS + _ring(
        stepped(Held(2 * SMALL, 4 * SMALL, 1), m), gpus, 2 * 24
    )
    optimiser = (actor.weights + SMALL) / gpus * OPTIMISER_BYTES / BYTES_PER_SECOND
    return Step(
        gpus=gpus, sequences=sequences, generate=generate, gather=gather, score=score,
        train=max(compute, communication) + critic + optimiser, tensor_parallel=tensor_parallel,
        is_parked=is_parked, is_network_bound=communication > compute,
    )  # fmt: skip


def _working_bytes(actor: Actor, micro_tokens: float) -> float:
    """What a gradient step needs beside what is resident: activations, and the weights that are gathered at a time."""
    activations = 2 * micro_tokens * actor.width * actor.layers * (1 if actor.is_checkpointed else 17)
    return activations + 2 * actor.weights * (2 / actor.layers if actor.stage == 3 else 1)


def _generate(actor: Actor, answers: int, tensor_parallel: int, room: float) -> float | None:
    """Seconds of one replica's answers, in rounds of as many as fit; None if not one does."""
    fit = min(RUNNING, int(room // (actor.cache_bytes / tensor_parallel)))
    if fit < 1:
        return None
    rounds = math.ceil(answers / fit)
    running = answers / rounds
    mean_cache = actor.cache_bytes * (PROMPT + ANSWER / 2) / (PROMPT + ANSWER)
    read = (2 * actor.weights + running * mean_cache) / tensor_parallel
    token = read / BYTES_PER_SECOND / OF_DECODING_FLOOR + actor.layers * LAYER_OVERHEAD
    decoding = ANSWER * (token + _sums(actor, running, tensor_parallel))
    reading = 2 * actor.weights * PROMPT * running / tensor_parallel / SCORING_FLOPS
    return rounds * (decoding + reading)


def _sums(actor: Actor, running: float, tensor_parallel: int) -> float:
    """Seconds of the two all-reduces of each layer for one token of the running answers."""
    if tensor_parallel == 1:
        return 0.0
    moved = 2 * (tensor_parallel - 1) / tensor_parallel * 2 * running * actor.width
    return 2 * actor.layers * (moved / (NVLINK * OF_LINK) + 2 * (tensor_parallel - 1) * HOP_IN_NODE)


def _ring(num_bytes: float, gpus: int, collectives: int) -> float:
    """Seconds in which rings bring each GPU what it lacks of so many bytes, by the slower of the links they cross."""
    if gpus == 1:
        return 0.0
    nodes = math.ceil(gpus / GPUS_PER_NODE)
    link = NVLINK if nodes == 1 else min(NVLINK, NETWORK * GPUS_PER_NODE)
    latency = (gpus - nodes) * HOP_IN_NODE + (nodes if nodes > 1 else 0) * HOP_BETWEEN_NODES
    return num_bytes * (gpus - 1) / gpus / (link * OF_LINK) + collectives * latency


def table() -> Iterator[str]:
    """The lines of docs/scaling.md."""
    columns = "actor, GPUs, generate, gather, score, train, step, sequences/s, efficiency, replica, published"
    yield f"| {columns.replace(', ', ' | ')} |"
    yield "|---" * 11 + "|"
    for actor in ACTORS:
        found = [step for i in range(10) if (step := step_of(actor, 2**i)) is not None]
        published = dict(actor.published)
        for step in found:
            efficiency = step.rate / step.gpus / (found[0].rate / found[0].gpus)
            cells = [actor.name, step.gpus, *map(_short, (step.generate, step.gather, step.score))]
            cells += [_short(step.train) + (" n" if step.is_network_bound else ""), _short(step.seconds)]
            cells += [
                _short(step.rate),
                f"{efficiency:.2f}",
                f"{step.tensor_parallel}{' p' if step.is_parked else ''}",
            ]
            yield f"| {' | '.join(map(str, cells))} | {published.get(step.gpus, '')} |"


def _short(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    print("\n".join(table()))
