"""The trained weights of a model, for checkpoints.

Responsible for: which weights a checkpoint holds and putting them back. With adapters these are the
adapters alone.
Not responsible for: files (runs/checkpoint.py), model folders (model/save.py).
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dovetail.errors import CheckpointError
from dovetail.model.shards import assign
from dovetail.model.slices import noted


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """Name -> weight, of those that learn. References, not copies."""
    return {name: noted(p.detach(), p) for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def load_trained(model: nn.Module, saved: Mapping[str, Tensor]) -> None:
    """Put saved weights back, bit for bit. Raises CheckpointError if they are of another model."""
    own = trained_weights(model)
    wrong = sorted(own.keys() ^ saved.keys()) or [
        name for name in own if own[name].shape != saved[name].shape
    ]
    if wrong:
        raise CheckpointError(
            f"checkpoint of another model: {wrong[0]} is on one side only, or has another shape",
            hint="resume with the model and adapters that the run began with, or start a new output_dir",
        )
    for name, weight in own.items():
        assign(weight, saved[name])
