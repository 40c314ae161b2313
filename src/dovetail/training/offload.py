"""Tensors that wait in host memory while the device's memory is needed for something else.

Responsible for: moving them there and back, bit for bit, in place: every reference to one of the tensors stays valid.
Not responsible for: which tensors are moved, and when (training/optim.py, rlhf/update.py).
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class Offloadable(Protocol):
    """A holder of tensors that can wait in host memory."""

    def offload(self) -> None:
        """Move its tensors to host memory; until `restore`, it cannot be used."""
        ...

    def restore(self) -> None:
        """Move its tensors back to the device, bit for bit."""
        ...


class OffloadableTensors:
    """Tensors and a buffer for them in host memory, made at the first use and kept; pinned if they are on a GPU.

    While offloaded, a tensor is on the host: nothing on the device may use it.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = list(tensors)
        self._devices = [tensor.device for tensor in self._tensors]
        self._buffers: list[Tensor] | None = None
        self.is_offloaded = False

    def offload(self) -> None:
        """Copy to the host and free the device's memory."""
        assert not self.is_offloaded, "offloaded twice"
        if self._buffers is None:
            self._buffers = [_buffer_for(tensor) for tensor in self._tensors]
        for tensor, buffer in zip(self._tensors, self._buffers, strict=True):
            buffer.copy_(tensor, non_blocking=True)
        _wait(self._devices)  # before the copies are whole, the originals must not be freed
        for tensor, buffer in zip(self._tensors, self._buffers, strict=True):
            tensor.data = buffer
        self.is_offloaded = True

    def restore(self) -> None:
        """Copy back into newly allocated memory of the device."""
        assert self.is_offloaded, "restored without being offloaded"
        for tensor, device in zip(self._tensors, self._devices, strict=True):
            back = torch.empty_like(tensor, device=device)
            back.copy_(tensor, non_blocking=True)
            tensor.data = back
        _wait(self._devices)  # the next offload overwrites the buffers
        self.is_offloaded = False


def _buffer_for(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)


def _wait(devices: Sequence[torch.device]) -> None:
    for device in {device for device in devices if device.type == "cuda"}:
        torch.cuda.synchronize(device)
