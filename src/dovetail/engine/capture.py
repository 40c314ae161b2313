"""Record device work as a CUDA graph.

Responsible for: one recording at a time, its stream and its memory, and the reason where it fails.
Not responsible for: what is recorded and when it is replayed (graphs.py).
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

import torch

_capturing = threading.Lock()
"""The lock under which models that decode in threads of their own capture one after the other: on one stream, into one
pool, with Python's collector off."""


def captured(
    device: torch.device, compute: Callable[[], None]
) -> tuple[torch.cuda.CUDAGraph | None, str | None]:
    """Run `compute` once, then record it; return the graph, or the reason why it cannot be recorded."""
    with _capturing:
        stream = _capture_stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        _, pool = _capture_pool(device)
        graph, why_not = torch.cuda.CUDAGraph(), None
        with torch.cuda.stream(stream), _no_garbage_collection():
            compute()  # kernels are compiled, and libraries set up, outside the recording
            try:
                graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                compute()
                graph.capture_end()
            except RuntimeError as error:
                with suppress(RuntimeError):
                    graph.capture_end()  # else the stream would go on recording
                why_not = str(error).split("\n")[0]
        torch.cuda.current_stream(device).wait_stream(stream)
    return (graph, None) if why_not is None else (None, why_not)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Keep Python's collector off, because freeing another engine's graphs would break a recording."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the one stream of all captures: the allocator keeps memory apart by stream."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


@cache
def _capture_pool(device: torch.device) -> tuple[torch.cuda.CUDAGraph, Any]:
    """Return an empty graph and the working memory of all captured steps.

    PyTorch frees a pool with its last graph and leaks its blocks; the empty graph keeps this one alive.
    """
    pool, graph = torch.cuda.graph_pool_handle(), torch.cuda.CUDAGraph()
    stream = _capture_stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        number = torch.zeros(1, device=device)
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        number + 1
        graph.capture_end()
    return graph, pool
