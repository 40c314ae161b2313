"""Run the largest pieces of a stage once before the long run, and see whether their memory fits.

Responsible for: what a device has held at most, comparing it with the plan, and smaller micro-batches where it comes
too near to the limit.
Not responsible for: the pieces (stages/supervised.py, rlhf/rehearsal.py), running out of memory (step.py).
"""

from collections.abc import Callable
from typing import Protocol

import torch

from dovetail.planning.memory import SLACK
from dovetail.telemetry.log import say, warn
from dovetail.training.step import TokenBudget

GIB = 2**30


class Probe(Protocol):
    """The memory of a device, in bytes."""

    def begin(self) -> None:
        """Forget what was held before."""
        ...

    def peak(self) -> int:
        """Return the most that this process has held since `begin`."""
        ...

    def limit(self) -> int:
        """Return the most that this process can hold."""
        ...


class GpuProbe:
    """The memory that torch has allocated on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def begin(self) -> None:
        torch.cuda.reset_peak_memory_stats(self._device)

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated(self._device)

    def limit(self) -> int:
        free, whole = torch.cuda.mem_get_info(self._device)
        allowed = int(torch.cuda.get_per_process_memory_fraction(self._device) * whole)
        return min(allowed, free + torch.cuda.memory_reserved(self._device))


def probe_of(device: torch.device) -> Probe | None:
    """Return what measures the memory of a device; None on a CPU, whose memory is nobody's alone: no rehearsal."""
    return GpuProbe(device) if device.type == "cuda" else None


def rehearse(
    attempt: Callable[[], None],
    *,
    probe: Probe,
    what: str,
    planned: Callable[[], float],
    shrink: Callable[[], str | None],
) -> None:
    """Run `attempt`, in smaller pieces until its peak leaves some memory free, and compare it with the plan.

    planned: the peak by the model of memory, in bytes. shrink: makes the pieces smaller and says how; None where that
    cannot be.
    """
    while True:
        probe.begin()
        attempt()
        peak, limit = probe.peak(), probe.limit()
        if peak * SLACK <= limit:
            break
        near = f"rehearsal: {what} peaks at {peak / GIB:.1f} GiB of {limit / GIB:.1f} GiB"
        shrunk = shrink()
        if shrunk is None:
            warn(
                f"{near}, and nothing is left to halve: the run may run out of memory; turn on "
                "activation_checkpointing, train LoRA adapters (actor.lora), or ask `dovetail plan` what fits"
            )
            break
        warn(f"{near}: {shrunk}; results do not depend on it")
    plan = planned()
    say(
        f"rehearsal: {what} peaks at {peak / GIB:.2f} GiB, planned {plan / GIB:.2f} GiB "
        f"({100 * (peak / plan - 1):+.0f} %), of {limit / GIB:.1f} GiB"
    )


def halve(budget: TokenBudget, longest: int) -> str | None:
    """Halve the micro-batches and say so; None where they may not shrink, or would not hold `longest` tokens."""
    if not budget.may_shrink or budget.tokens // 2 < longest:
        return None
    budget.tokens //= 2
    return f"micro-batches halved from {2 * budget.tokens} to {budget.tokens} tokens"
