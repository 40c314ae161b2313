"""Where a prefill puts keys and values, and that its attention is that of training, in parts as whole."""

from __future__ import annotations

import pytest
import torch

from dovetail.batches import pack
from dovetail.engine.forward import Prefill
from dovetail.engine.kv_cache import KVArena, KVShape
from dovetail.engine.sampling import Sampling
from dovetail.engine.scheduler import Answer, Chunk
from dovetail.model.attention import AttentionCall, PackedLayout

CPU = torch.device("cpu")
SAMPLING = Sampling(max_new_tokens=5)


def test_every_token_lands_in_its_own_page_and_place_and_attention_is_the_packed_one() -> None:
    arena = KVArena(KVShape(2, 2, 4, torch.float64), 6, CPU)
    first = Answer(0, tuple(range(70)), SAMPLING, 0, 5, pages=[4, 1])
    second = Answer(1, (7, 8), SAMPLING, 0, 5, token_ids=[9], pages=[0])  # preempted after one token
    prefill = Prefill([Chunk(first, 0, 70), Chunk(second, 0, 3)], arena, CPU)
    assert prefill.ids_T.tolist() == [*range(70), 7, 8, 9]
    assert prefill.positions_T.tolist() == [*range(70), 0, 1, 2]
    assert prefill.last_index_S().tolist() == [69, 72]
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 73, 4, generator=generator).double()
    call = AttentionCall(1, 0.3)
    out = prefill.attend(query, key, value, call)
    packed = PackedLayout.of(pack([range(70), range(3)], [[False] * 70, [False] * 3]))
    torch.testing.assert_close(out, packed.attend(query, key, value, call))
    places = [(4, t) if t < 64 else (1, t - 64) for t in range(70)] + [(0, t) for t in range(3)]
    for stored, new in zip(arena.tiles(1, 6), (key, value), strict=True):
        pages = stored.view(6, 2, 64, 4)
        for token, (page, offset) in enumerate(places):
            assert torch.equal(pages[page, :, offset], new[0, :, token])


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (5, None), (90, 1.5), (None, 2.0)])
def test_prompts_read_in_parts_give_what_they_give_whole(window: int | None, softcap: float | None) -> None:
    lengths = (70, 130, 9)
    arena = KVArena(KVShape(1, 2, 4, torch.float64), 9, CPU)
    pages = ([4, 1], [8, 0, 3], [2])
    answers = [Answer(i, tuple(range(n)), SAMPLING, 0, 5, pages=pages[i]) for i, n in enumerate(lengths)]
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(
        1, 4, sum(lengths), 4, generator=generator
    ).double()  # two query heads share a key head
    key, value = torch.randn(2, 1, 2, sum(lengths), 4, generator=generator).double()
    call = AttentionCall(0, 0.3, window, softcap)
    packed = PackedLayout.of(pack([range(n) for n in lengths], [[False] * n for n in lengths]))
    whole = packed.attend(query, key, value, call)
    starts = (0, 70, 200)
    parts = torch.full_like(whole, torch.nan)
    for cuts in ([(0, 0, 30), (1, 0, 64)], [(0, 30, 70), (1, 64, 65), (2, 0, 9)], [(1, 65, 130)]):
        chunks = [Chunk(answers[i], a, b) for i, a, b in cuts]
        places = torch.cat([torch.arange(starts[i] + a, starts[i] + b) for i, a, b in cuts])
        prefill = Prefill(chunks, arena, CPU)
        assert prefill.positions_T.tolist() == [t for _, a, b in cuts for t in range(a, b)]
        found = prefill.attend(
            query[:, :, places],
            key[:, :, places],
            value[:, :, places],
            call,
        )
        parts[:, places] = found
    torch.testing.assert_close(parts, whole)
