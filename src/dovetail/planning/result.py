"""The records of a plan: the machine, and of each stage its phases in bytes and seconds.

Responsible for: what a plan says, and the same as plain values. Not responsible for: making it (plan.py), words
(report.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dovetail.config.run import StageName
from dovetail.planning.architecture import Shape
from dovetail.planning.hardware import Gpu
from dovetail.planning.memory import SLACK, total
from dovetail.planning.time import Parts


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """The GPUs of a run."""

    gpu: Gpu
    num_gpus: int = 1
    """The number of GPUs in each node."""
    num_nodes: int = 1
    price: float | None = None
    """Dollars of a GPU and hour; None: the catalogue's."""

    @property
    def processes(self) -> int:
        return self.num_gpus * self.num_nodes

    @property
    def dollars_per_second(self) -> float:
        price = self.gpu.price if self.price is None else self.price
        return price * self.processes / 3600


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """A phase of a stage in one process: what is in memory at its peak, and where its time goes."""

    name: str
    items: dict[str, float]
    """Item -> bytes."""
    seconds: Parts
    """Part -> seconds of one step."""

    @property
    def peak(self) -> float:
        return total(self.items)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A stage of the run."""

    name: StageName
    phases: tuple[Phase, ...]
    steps: int
    rows: int
    """The rows that it reads, repetitions included."""
    tokens_per_step: int
    is_checkpointed: bool
    running: int | None = None
    """The answers that are decoded at once in a process."""
    on_host: dict[str, float] = field(default_factory=dict)
    """Bytes in the host's memory, of each process."""

    @property
    def step_seconds(self) -> float:
        return sum(sum(phase.seconds.values()) for phase in self.phases)

    @property
    def seconds(self) -> float:
        """Seconds of all steps, without loading, evaluation and saving."""
        return self.steps * self.step_seconds

    @property
    def peak(self) -> float:
        return max(phase.peak for phase in self.phases)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A run on a machine."""

    actor: Shape
    reward_model: Shape
    machine: Machine
    stages: tuple[Stage, ...]

    @property
    def peak(self) -> float:
        """The most bytes that torch holds in a process."""
        return max(stage.peak for stage in self.stages)

    @property
    def fits(self) -> bool:
        return self.peak * SLACK <= self.machine.gpu.usable_bytes

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages)

    @property
    def dollars(self) -> float:
        return self.seconds * self.machine.dollars_per_second

    def as_json(self) -> dict[str, Any]:
        """Return the whole plan as plain values, in bytes, seconds and dollars."""
        return {
            "actor": {"name": self.actor.name, "weights": self.actor.num_weights},
            "reward_model": {"name": self.reward_model.name, "weights": self.reward_model.num_scalar_weights},
            "gpu": self.machine.gpu.key,
            "gpus_per_node": self.machine.num_gpus,
            "nodes": self.machine.num_nodes,
            "usable_bytes": self.machine.gpu.usable_bytes,
            "peak_bytes": self.peak,
            "fits": self.fits,
            "seconds": self.seconds,
            "dollars": self.dollars,
            "stages": [_stage_as_json(stage) for stage in self.stages],
        }


def _stage_as_json(stage: Stage) -> dict[str, Any]:
    return {
        "name": stage.name,
        "steps": stage.steps,
        "rows": stage.rows,
        "step_seconds": stage.step_seconds,
        "seconds": stage.seconds,
        "activation_checkpointing": stage.is_checkpointed,
        "answers_at_once": stage.running,
        "host_bytes": stage.on_host,
        "phases": [
            {"name": phase.name, "peak_bytes": phase.peak, "bytes": phase.items, "seconds": phase.seconds}
            for phase in stage.phases
        ],
    }
