"""Pages against a plain model of them: a dictionary from page to content."""

from __future__ import annotations

import random

import torch

from dovetail.engine.kv_cache import PAGE_TOKENS, KVArena, KVShape, PagePool, pages_for

SHAPE = KVShape(num_layers=2, num_heads=3, head_width=4, dtype=torch.float32)
CPU = torch.device("cpu")


def test_pages_for_rounds_up() -> None:
    assert [pages_for(n) for n in (0, 1, 64, 65, 128)] == [0, 1, 1, 2, 2]


def test_used_pages_stay_the_first_ones_and_keep_their_content_whoever_leaves() -> None:
    pool, rng = PagePool(40), random.Random(0)
    tables: dict[int, list[int]] = {}
    content: dict[int, tuple[int, int]] = {}
    for step in range(300):
        if tables and (rng.random() < 0.4 or pool.num_free < 4):
            leaving = rng.sample(sorted(tables), rng.randint(1, len(tables)))
            for source, target in pool.give_back([tables[name] for name in leaving]):
                content[target] = content[source]
            assert all(tables.pop(name) == [] for name in leaving)
        else:
            tables.setdefault(rng.choice([step, *tables]), [])
            name = next(reversed(tables)) if rng.random() < 0.5 else rng.choice(list(tables))
            before = len(tables[name])
            pool.take(tables[name], rng.randint(1, 3))
            for place in range(before, len(tables[name])):
                content[tables[name][place]] = (name, place)
        assert sorted(page for table in tables.values() for page in table) == list(range(pool.num_used))
        for name, table in tables.items():
            assert [content[page] for page in table] == [(name, place) for place in range(len(table))]


def test_written_tokens_are_found_in_their_page_after_it_moved() -> None:
    arena = KVArena(SHAPE, 4, CPU)
    arena.clear([0, 1, 2, 3])
    key, value = torch.randn(1, 3, 2, 4), torch.randn(1, 3, 2, 4)
    arena.write(1, key, value, arena.rows_of(torch.tensor([3, 2]), torch.tensor([5, 63])))
    arena.move([(3, 0)])
    keys, values = arena.tiles(1, 4)
    for stored, new in ((keys, key), (values, value)):
        pages = stored.view(4, 3, PAGE_TOKENS, 4)
        assert torch.equal(pages[0, :, 5], new[0, :, 0])
        assert torch.equal(pages[2, :, 63], new[0, :, 1])
        assert pages[1].abs().sum() == 0
    assert arena.tiles(0, 4)[0].abs().sum() == 0


def test_a_page_costs_what_it_stores() -> None:
    assert SHAPE.page_bytes == 2 * 2 * 3 * 64 * 4 * 4
