"""The size of the KV arena, and its allocation.

Responsible for: the memory that is free, and an arena as large as wanted or as large as fits.
Not responsible for: what is stored in it (kv_cache.py).
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import torch

from dovetail.engine.kv_cache import KVArena, KVShape
from dovetail.errors import GenerationError

_USABLE = 0.8
"""The share of the free memory that the arena may take; the rest is for activations of the prefill."""


def free_bytes(device: torch.device) -> int:
    """Return how much memory is still free on the device, the allocator's own reserve included."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        available = next(line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable"))
        return int(available.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def allocate_arena(
    shape: KVShape, wanted_pages: int, device: torch.device, *, dense: bool = True, lone: bool = False
) -> KVArena:
    """Return an arena of `wanted_pages`, or of what fits, down to a single page; sequences then take turns."""
    planned = num_pages = max(1, min(wanted_pages, int(_USABLE * free_bytes(device)) // shape.page_bytes))
    while True:
        try:
            arena = KVArena(shape, num_pages, device, dense=dense, lone=lone)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            if num_pages == 1:
                raise GenerationError(
                    f"no memory for one page of the KV cache ({shape.page_bytes} bytes) on {device}",
                    hint="free memory on the device, or use a smaller model or precision",
                ) from error
            num_pages = num_pages * 3 // 4
            continue
        if num_pages < planned:
            warnings.warn(
                f"KV cache: memory for {num_pages} pages in place of {planned}; fewer answers run at once",
                stacklevel=2,
            )
        return arena


def _is_out_of_memory(error: Exception) -> bool:
    """Return whether memory ran out: the CPU allocator raises a plain RuntimeError that only its words identify."""
    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)
