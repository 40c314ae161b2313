"""The GPUs that the planner knows.

Responsible for: their figures and where each is from (hardware.yaml).
Not responsible for: what software reaches of them (time.py).
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from dovetail.errors import ConfigError

CATALOGUE = Path(__file__).with_name("hardware.yaml")
GPUS_PER_NODE = 8
CONTEXT_BYTES = 0.8 * 2**30
"""The memory that the driver, cuBLAS and the kernels take of a card beside torch's allocator."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One kind of GPU, in bytes, seconds and dollars."""

    key: str
    name: str
    memory: float
    """GiB that the driver reports."""
    bandwidth: float
    """GB/s of its memory, by the data sheet."""
    tflops: float
    """Dense 16-bit TFLOP/s with float32 sums, by the data sheet."""
    link: float
    """GB/s per direction to the other GPUs of a node."""
    network: float
    """GB/s of a GPU's share of the links between nodes."""
    price: float
    """Dollars an hour."""
    source: str
    price_source: str
    bf16: bool = True
    """True if it computes in bf16; else runs use fp16."""

    @property
    def usable_bytes(self) -> float:
        """The bytes that torch can allocate."""
        return self.memory * 2**30 - CONTEXT_BYTES

    @property
    def bytes_per_second(self) -> float:
        return self.bandwidth * 1e9

    @property
    def flop_per_second(self) -> float:
        return self.tflops * 1e12


@cache
def gpus() -> dict[str, Gpu]:
    """Return the GPUs by their short names."""
    found: dict[str, dict[str, Any]] = yaml.safe_load(CATALOGUE.read_text(encoding="utf-8"))
    return {key: Gpu(key=key, **values) for key, values in found.items()}


def gpu_named(name: str) -> Gpu:
    """Return a GPU by its short name or the beginning of it (h100, a100-80g). Raises ConfigError if none is meant."""
    plain = name.lower().replace("_", "-")
    matching = [gpu for key, gpu in gpus().items() if key == plain or key.startswith(f"{plain}-")]
    if len(matching) == 1:
        return matching[0]
    if matching:
        raise ConfigError(
            f"--gpu {name}: there are several", hint=f"give {', '.join(g.key for g in matching)}"
        )
    close = difflib.get_close_matches(plain, gpus(), n=1)
    guess = f"did you mean {close[0]}? " if close else ""
    raise ConfigError(f"--gpu {name}: not in the catalogue", hint=f"{guess}it has {', '.join(gpus())}")


def gpu_like(name: str, gib: float) -> Gpu | None:
    """Return the catalogue's GPU that a driver calls so ("NVIDIA A100-SXM4-80GB"), with the memory nearest to `gib`."""
    words = set(name.lower().replace("-", " ").split())
    alike = [gpu for key, gpu in gpus().items() if key.removeprefix("rtx-").split("-")[0] in words]
    return min(alike, key=lambda gpu: abs(gpu.memory - gib), default=None)
