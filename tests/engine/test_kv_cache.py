"""Pages against a plain model of them: a dictionary from page to content."""

from __future__ import annotations

import random

import torch

from dovetail.engine.kv_cache import PAGE_TOKENS, KVArena, KVShape, PagePool, pages_for

SHAPE = KVShape(num_layers=2, num_heads=3, head_width=4, dtype=torch.float32)
CPU = torch.device("cpu")


def test_pages_for_rounds_up() -> None:
    assert [pages_for(n) for n in (0, 1, 64, 65, 128)] == [0, 1, 1, 2, 2]


def test_used_pages_can_be_kept_the_first_ones_and_keep_their_content_whoever_leaves_or_shares() -> None:
    pool, rng = PagePool(60), random.Random(0)
    tables: dict[int, list[int]] = {}
    expected: dict[int, list[int]] = {}
    content: dict[int, int] = {}  # page -> a number written when it was taken
    has_shared = 0
    for step in range(600):
        if tables and (rng.random() < 0.3 or pool.num_free < 4):
            leaving = rng.sample(sorted(tables), rng.randint(1, len(tables)))
            pool.free([tables[name] for name in leaving])
            assert all(tables.pop(name) == [] for name in leaving)
            if rng.random() < 0.7:
                for source, target in pool.close_ranks():
                    content[target] = content[source]
                assert {page for table in tables.values() for page in table} == set(range(pool.num_used))
        else:
            tables[step], expected[step] = [], []
            donor = rng.choice(sorted(tables))
            shared = tables[donor][: rng.randint(0, 2)]
            has_shared += bool(shared)
            pool.share(tables[step], shared)
            pool.take(tables[step], rng.randint(1, 3))
            for page in tables[step][len(shared) :]:
                content[page] = len(content) * 1000 + step
            expected[step] = [content[page] for page in tables[step]]
        used = {page for table in tables.values() for page in table}
        assert (pool.num_used, pool.num_free) == (len(used), 60 - len(used))
        for name, table in tables.items():
            assert [content[page] for page in table] == expected[name]
    assert has_shared > 50


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
