"""Choose the device and the dtype on it, and recognise the errors of a device that is full.

Responsible for: turning the settings `device` and `precision` into what torch takes.
"""

import torch

from dovetail.errors import ConfigError

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_MARKS = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "not enough memory")


def resolve_device(name: str) -> torch.device:
    """`auto` is the first GPU if there is one. Raises ConfigError if the device is not there."""
    if name == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(
            f"device = {name!r} is not a device", hint="use auto, cpu, cuda or cuda:N"
        ) from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(
            f"device = {name!r}: Dovetail runs on GPUs that torch calls cuda and on the CPU, not on {device.type}",
            hint="use device=cpu, or device=cuda on a machine with an NVIDIA or AMD GPU",
        )
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"device = {name!r}, but torch {torch.__version__} finds no GPU",
            hint="use device=cpu, or install a torch that matches the driver; `dovetail doctor` tells more",
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device = {name!r}, but this machine has {torch.cuda.device_count()} GPUs, numbered from 0",
            hint="use device=cuda, or a number that is there; see nvidia-smi and CUDA_VISIBLE_DEVICES",
        )
    return device


def resolve_dtype(precision: str, device: torch.device) -> torch.dtype:
    """`auto`: bf16 on GPUs that compute in it, fp16 on older ones, float32 on the CPU."""
    if precision != "auto":
        return _DTYPES[precision]
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether the error says that an accelerator, the CPU allocator or Python found no memory."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(mark in str(error) for mark in _MARKS)
