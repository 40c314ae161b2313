"""The averaged copy of a trained model.

Responsible for: an exponential moving average of the trained weights in float32.
Not responsible for: when to update (once per optimiser step), a model that has it (parallel/shard.py), saving one
(model/save.py).

Why float32: a step of the average is (1 - decay) times a step of training, below bf16's resolution; an
average kept in bf16 never moves.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dovetail.errors import CheckpointError
from dovetail.model.shards import assign, is_offloaded, local, shard_like
from dovetail.model.slices import noted
from dovetail.training.optim import Optimizer
from dovetail.training.parking import ParkingSpace
from dovetail.training.weights import trained_weights


class Ema:
    """average <- decay * average + (1 - decay) * weight, for every trainable weight (the rows that are here).

    optimizer: where the full-precision weights are, if the model computes in bf16 or fp16.
    """

    def __init__(self, model: nn.Module, *, decay: float, optimizer: Optimizer | None = None) -> None:
        self.decay = decay
        self._weights = optimizer.weights if optimizer is not None else lambda: trained_weights(model)
        self._averages = {
            name: _full_precision(local(weight)).clone() for name, weight in self._weights().items()
        }
        self._parameters = {name: p for name, p in model.named_parameters() if name in self._averages}
        self._parking = ParkingSpace(
            [self._averages[name] for name, p in self._parameters.items() if not is_offloaded(p)]
        )

    def park(self) -> None:
        """Keep the averages in host memory until `restore`."""
        self._parking.park()

    def restore(self) -> None:
        """Move the averages back to the device, bit for bit."""
        self._parking.restore()

    @torch.no_grad()
    def update(self) -> None:
        """Move the averages towards the weights as they are now."""
        assert not self._parking.is_parked, "an update while the average is parked"
        weights = [_full_precision(local(weight)) for weight in self._weights().values()]
        torch._foreach_lerp_(list(self._averages.values()), weights, 1.0 - self.decay)

    def averages(self) -> dict[str, Tensor]:
        """Name -> average, float32, sharded as the weight is: references, not copies."""
        return {
            name: noted(shard_like(parameter, self._averages[name]), parameter)
            for name, parameter in self._parameters.items()
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the float32 averages themselves, not copies."""
        return {"averages": self.averages()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`, bit for bit. Raises CheckpointError if it is of other weights."""
        saved: Mapping[str, Tensor] = state["averages"]
        if saved.keys() != self._averages.keys():
            different = sorted(saved.keys() ^ self._averages.keys())
            raise CheckpointError(
                f"moving average of another model: {different[0]} is on one side only",
                hint="resume with the model and adapters that the run began with",
            )
        for name, average in self._averages.items():
            assign(shard_like(self._parameters[name], average), saved[name])


def _full_precision(weight: Tensor) -> Tensor:
    return weight if weight.dtype in (torch.float32, torch.float64) else weight.float()
