"""Getting an arena when memory is short."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dovetail.engine import kv_cache
from dovetail.engine.kv_cache import KVArena, KVShape
from dovetail.errors import GenerationError

SHAPE = KVShape(num_layers=1, num_heads=1, head_width=2, dtype=torch.float32)
CPU = torch.device("cpu")


def failing_above(limit: int, error: type[RuntimeError]) -> Any:
    """An arena class whose allocation fails above so many pages."""

    def allocate(shape: KVShape, num_pages: int, device: torch.device, **_: bool) -> KVArena:
        if num_pages > limit:
            raise error("DefaultCPUAllocator: can't allocate memory: you tried to allocate 7 bytes")
        return KVArena(shape, num_pages, device)

    return allocate


def test_this_machine_has_free_memory() -> None:
    assert kv_cache.free_bytes(CPU) > 2**20


def test_an_arena_is_as_large_as_wanted() -> None:
    assert kv_cache.allocate_arena(SHAPE, 7, CPU).num_pages == 7


def test_an_arena_is_bounded_by_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_cache, "free_bytes", lambda _: 10 * SHAPE.page_bytes)
    assert kv_cache.allocate_arena(SHAPE, 100, CPU).num_pages == 8


@pytest.mark.parametrize("error", [RuntimeError, torch.OutOfMemoryError])
def test_after_a_failed_allocation_fewer_pages_are_tried_and_it_says_so(
    monkeypatch: pytest.MonkeyPatch, error: type[RuntimeError]
) -> None:
    monkeypatch.setattr(kv_cache, "KVArena", failing_above(5, error))
    with pytest.warns(UserWarning, match="memory for 4 pages in place of 20; fewer answers run at once"):
        assert kv_cache.allocate_arena(SHAPE, 20, CPU).num_pages == 4  # 20, 15, 11, 8, 6, 4


def test_no_memory_for_one_page_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_cache, "KVArena", failing_above(0, torch.OutOfMemoryError))
    with pytest.raises(GenerationError, match="no memory for one page"):
        kv_cache.allocate_arena(SHAPE, 1, CPU)


def test_other_errors_are_not_taken_for_want_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> KVArena:
        raise RuntimeError("invalid device")

    monkeypatch.setattr(kv_cache, "KVArena", broken)
    with pytest.raises(RuntimeError, match="invalid device"):
        kv_cache.allocate_arena(SHAPE, 4, CPU)
