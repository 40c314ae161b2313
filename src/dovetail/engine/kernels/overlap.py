"""Kernels that begin while the one before ends: Hopper's programmatic dependent launch.

Responsible for: waiting for the kernel before, and fetching into the cache meanwhile what no kernel of the step writes.
Not responsible for: which kernels do so.

Every kernel launched with `overlapping` calls `wait_for_previous` before it reads or writes anything that another
kernel of the step wrote; what it may touch earlier are weights, page tables and old keys and values.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def let_next_start(OVERLAPS: tl.constexpr):
    """Allow the next kernel to be launched; it then waits in its own `wait_for_previous`."""
    if OVERLAPS:
        gdc_launch_dependents()


@triton.jit
def wait_for_previous(OVERLAPS: tl.constexpr):
    """Wait until the kernels before are done and their writes are seen."""
    if OVERLAPS:
        gdc_wait()


@triton.jit
def fetch(pointers):
    """Bring the 128 bytes at each address into the L2 cache."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointers], dtype=tl.int32, is_pure=False, pack=1
    )


@cache
def overlaps(device: torch.device) -> bool:
    """Return whether the device can launch a kernel before the previous one has ended."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


def overlapping(device: torch.device) -> dict[str, Any]:
    """Return the launch options of a kernel that calls the functions above."""
    return {"OVERLAPS": True, "launch_pdl": True} if overlaps(device) else {"OVERLAPS": False}
