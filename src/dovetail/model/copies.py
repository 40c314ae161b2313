"""Copies of a model that share nothing with it.

Responsible for: deep copies of weights and modules, peft-wrapped or not, on any device.
Not responsible for: moving averages (training/optim.py).
"""

import copy
from typing import Any, TypeVar

import torch
from torch import nn

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def copy_of(model: ModuleT, *, device: torch.device | None = None) -> ModuleT:
    """Return the same model with its own weights, without gradients or gradient hooks; tied weights stay tied.

    The weights go straight to `device` (default: where they are), so copying a model off a full GPU needs no
    room for a second one on it.
    """
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        data = parameter.detach().to(device=device, copy=True)
        memo[id(parameter)] = nn.Parameter(data, requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.detach().to(device=device, copy=True)
    return copy.deepcopy(model, memo)
