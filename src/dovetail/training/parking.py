"""Tensors that wait in host memory while the device's memory is needed for something else.

Responsible for: moving them there and back, bit for bit, under the same names: whoever holds a reference to one
of the tensors holds it before, during and after.
Not responsible for: what is parked and when (training/optim.py, training/optim.py, rlhf/build.py).
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class Parkable(Protocol):
    """A holder of tensors that can wait in host memory."""

    def park(self) -> None:
        """Go there; until `restore`, it cannot be used."""
        ...

    def restore(self) -> None:
        """Be back on the device, bit for bit."""
        ...


class ParkingSpace:
    """Room in host memory for some tensors, made at the first use and kept; pinned where they are on a GPU.

    While parked, a tensor is on the host: nothing on the device may use it.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = list(tensors)
        self._devices = [tensor.device for tensor in self._tensors]
        self._room: list[Tensor] | None = None
        self.is_parked = False

    def park(self) -> None:
        """Copy to the host and free the device's memory."""
        assert not self.is_parked, "parked twice"
        if self._room is None:
            self._room = [_room_for(tensor) for tensor in self._tensors]
        for tensor, room in zip(self._tensors, self._room, strict=True):
            room.copy_(tensor, non_blocking=True)
        _wait(self._devices)  # before the copies are whole, the originals must not be freed
        for tensor, room in zip(self._tensors, self._room, strict=True):
            tensor.data = room
        self.is_parked = True

    def restore(self) -> None:
        """Back on the device; its memory is asked for anew."""
        assert self.is_parked, "restored without being parked"
        for tensor, device in zip(self._tensors, self._devices, strict=True):
            back = torch.empty_like(tensor, device=device)
            back.copy_(tensor, non_blocking=True)
            tensor.data = back
        _wait(self._devices)  # the room will be written over the next time
        self.is_parked = False


def _room_for(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)


def _wait(devices: Sequence[torch.device]) -> None:
    for device in {device for device in devices if device.type == "cuda"}:
        torch.cuda.synchronize(device)
