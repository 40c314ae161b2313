"""Distribute the models of a run over its processes, role by role.

Responsible for: binding the settings of each role to the processes. Not responsible for: what the settings mean
(config/sharding.py), what is done to a model (shard.py).
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from dovetail.config.sharding import OffloadConfig, TensorParallelConfig, ZeroStageConfig
from dovetail.parallel.grid import in_rows
from dovetail.parallel.shard import shard_model
from dovetail.parallel.world import ALONE, World

Role = Literal["actor", "critic", "reference", "reward_model"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharing:
    """The processes, and what they share of each model. By default this process has all of them to itself."""

    world: World = ALONE
    zero_stage: ZeroStageConfig = field(default_factory=ZeroStageConfig)
    offload: OffloadConfig = field(default_factory=OffloadConfig)
    tensor_parallel: TensorParallelConfig = field(default_factory=TensorParallelConfig)

    @property
    def shard_size(self) -> int:
        """The number of ranks that shard one copy. Raises ConfigError if they cannot be grouped so."""
        return self.zero_stage.shard_size(processes=self.world.size, per_machine=self.world.local_size)

    @property
    def may_retry(self) -> bool:
        """Return whether a pass that ran out of memory may run again in smaller parts.

        It may not where other ranks wait in a collective of it, or copies from host memory are under way.
        """
        return self.world.size == 1 and not self.offload.models

    def shard(self, model: Any, role: Role, device: torch.device) -> None:
        """Shard the model in place as its role's settings say. A collective.

        Raises ConfigError for settings that do not go together.
        """
        self.tensor_parallel.expect_supported(self.zero_stage, self.offload)
        shard_model(
            model,
            stage=getattr(self.zero_stage, role),
            # Those that compute each layer together are neighbours.
            world=in_rows(self.world, self.tensor_parallel.training),
            device=device,
            shard_size=self.shard_size,
            offload=getattr(self.offload, role),
        )
