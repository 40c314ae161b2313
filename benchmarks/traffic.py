"""What this process receives in collectives, counted at the operators that torch runs for them.

Counted is what a ring algorithm receives, whatever the backend does; from autograd's threads as well. Every operator
of the block takes a detour through Python, so nothing should be timed in it.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

COLLECTIVES: dict[str, tuple[int | None, int]] = {
    "c10d::_allgather_base_": (0, 1),
    "c10d::allgather_": (0, 1),
    "c10d::_reduce_scatter_base_": (1, 1),
    "c10d::reduce_scatter_": (1, 1),
    "c10d::allreduce_": (0, 2),
    "c10d::broadcast_": (0, 1),
    "_c10d_functional::all_gather_into_tensor": (None, 1),
    "_c10d_functional::reduce_scatter_tensor": (0, 1),
    "_c10d_functional::all_reduce": (0, 2),
    "_c10d_functional::all_reduce_": (0, 2),
}
"""Operator -> which argument is whole (None: the result), and how often a ring passes it on, in units of (N - 1) / N.
A broadcast's sender receives nothing, the others all: (N - 1) / N is their mean."""


class Traffic(TorchDispatchMode):
    """`with Traffic() as traffic: ...`; afterwards it knows what was received."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []
        """(operator without its namespace, bytes received) of each collective, in order."""

    def received(self) -> dict[str, int]:
        """Operator -> bytes, together."""
        total: Counter[str] = Counter()
        for name, num_bytes in self.calls:
            total[name] += num_bytes
        return dict(total)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # first it shall say which collectives it wants
        result = func(*args, **(kwargs or {}))
        name = func.name().partition(".")[0] if isinstance(func, torch._ops.OpOverload) else ""
        if name in COLLECTIVES:
            which, times = COLLECTIVES[name]
            whole = tree_leaves(result if which is None else args[which])
            num_bytes = sum(t.numel() * t.element_size() for t in whole if isinstance(t, Tensor))
            size = _group_size(func, args)
            self.calls.append((name.partition("::")[2].strip("_"), times * num_bytes * (size - 1) // size))
        return result


def _group_size(func: Any, args: Any) -> int:
    given = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)}
    if "group_name" in given:
        return _resolve_process_group(given["group_name"]).size()
    return ProcessGroup.unbox(given["process_group"]).size()
