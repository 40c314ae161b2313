"""The distribution of each model's weights over several devices.

Responsible for: the ZeRO stages, how many devices share one copy, over how many each layer is divided, and whose
weights wait in host memory.
Not responsible for: what they do (parallel/), how many devices there are.
"""

from typing import ClassVar, Literal, Self

from pydantic import PositiveInt, model_validator

from dovetail.config.frozen import FrozenModel
from dovetail.errors import ConfigError


class ZeroStageConfig(FrozenModel):
    """The ZeRO stage of each model (Rajbhandari et al. 2019, arXiv:1910.02054), which FSDP2 carries out.

    0: nothing, every process holds all. 1: weights, gradients and optimiser states at rest; gradients are reduced once
    per step. 2: the same, and gradients are reduced after each micro-batch. 3: the same, and weights are gathered layer
    by layer when they are needed. Results do not depend on it but for rounding. One process alone divides nothing.
    """

    advanced: ClassVar[frozenset[str]] = frozenset({"reference", "reward_model", "shard_over"})

    actor: Literal[0, 1, 2, 3] = 1
    """The model that stage 1 and PPO train."""
    critic: Literal[0, 1, 2, 3] = 1
    """The model that stage 2 trains, and PPO's critic."""
    reference: Literal[0, 3] = 0
    """PPO's frozen copy of the actor."""
    reward_model: Literal[0, 3] = 0
    """The frozen reward model of PPO."""
    shard_over: Literal["all", "node"] | PositiveInt = "all"
    """The processes that shard one copy: all; those of each machine (node); or so many neighbours. Each group has a
    copy, and gradients are summed over the groups once per step (HSDP)."""

    @model_validator(mode="after")
    def _groups_need_something_to_shard(self) -> Self:
        if self.shard_over != "all" and not any((self.actor, self.critic, self.reference, self.reward_model)):
            raise ValueError(
                f"shard_over = {self.shard_over} says who shards together, but all four stages are 0: nothing is "
                "sharded; set a stage to 1, 2 or 3, or leave out shard_over"
            )
        return self

    def shard_size(self, *, processes: int, per_machine: int) -> int:
        """Return how many of the run's processes shard one copy. per_machine: 0 if machines differ.

        Raises ConfigError if they cannot be grouped as asked for.
        """
        if self.shard_over == "all":
            return processes
        size = per_machine if self.shard_over == "node" else self.shard_over
        if size == 0:
            raise ConfigError(
                "zero_stage.shard_over = node needs the same number of processes on every machine, and these differ",
                hint="give all machines the same --num-gpus, or set zero_stage.shard_over to a number or all",
            )
        possible = [str(n) for n in range(2, processes + 1) if processes % n == 0]
        if processes % size or size == 1 < processes:
            each = f" ({size} on each machine)" if self.shard_over == "node" else ""
            why = "one process alone has none to shard with" if size == 1 else "no whole number of groups"
            raise ConfigError(
                f"zero_stage.shard_over = {self.shard_over}{each}, but the run has {processes} "
                f"process{'es' if processes > 1 else ''}: {why}",
                hint=f"set zero_stage.shard_over to {', '.join(['all', *possible])}",
            )
        return size


class OffloadConfig(FrozenModel):
    """The sharded models whose weights, gradients and optimiser states live in host memory.

    Weights come to the device when they are needed, gradients leave it, and AdamW steps on the CPU.
    """

    advanced: ClassVar[frozenset[str]] = frozenset({"actor", "critic", "reference", "reward_model"})

    actor: bool = False
    """The model that stage 1 and PPO train."""
    critic: bool = False
    """The model that stage 2 trains, and PPO's critic."""
    reference: bool = False
    """PPO's frozen copy of the actor."""
    reward_model: bool = False
    """The frozen reward model of PPO."""

    @property
    def models(self) -> list[str]:
        """Return the models that are offloaded."""
        return [name for name, is_offloaded in self if is_offloaded]


class TensorParallelConfig(FrozenModel):
    """The number of processes that compute each layer together (Shoeybi et al. 2019, arXiv:1909.08053)."""

    advanced: ClassVar[frozenset[str]] = frozenset({"generation"})

    training: PositiveInt = 1
    """Neighbouring processes that compute each layer of every model together while it scores and learns, each with a
    slice of the layer's weights; the other processes work on other sequences and shard the slices (`zero_stage`)."""
    generation: Literal["auto"] | PositiveInt = "auto"
    """The number of processes that hold one copy of the actor while answers are generated; groups share the prompts.
    auto: 1 if by an estimate the whole model fits on a GPU beside what stays there, else as few as fit; 1 on a CPU."""

    def expect_supported(self, zero_stage: ZeroStageConfig, offload: OffloadConfig) -> None:
        """Raise ConfigError for settings that do not go together."""
        if self.training == 1:
            return
        others = {f"offload.{name}": ("true", "false") for name in offload.models}
        if zero_stage.shard_over != "all":
            others["zero_stage.shard_over"] = (str(zero_stage.shard_over), "all")
        for name, (found, possible) in others.items():
            raise ConfigError(
                f"tensor_parallel.training = {self.training} and {name} = {found} cannot be combined yet",
                hint=f"set {name}={possible}, or tensor_parallel.training=1",
            )
