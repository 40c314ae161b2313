"""Where a prefill puts keys and values, and that its attention is that of training."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from dovetail.engine.answers import Answer
from dovetail.engine.kv_cache import KVArena, KVShape
from dovetail.engine.prefill import PrefillLayout, packed_prompts
from dovetail.engine.sampling import Sampling
from dovetail.model.attention import PackedLayout


def test_every_token_lands_in_its_own_page_and_place_and_attention_is_the_packed_one() -> None:
    arena = KVArena(KVShape(2, 2, 4, torch.float64), 6, torch.device("cpu"))
    sampling = Sampling(max_new_tokens=5)
    first = Answer(0, tuple(range(70)), sampling, 0, 5, pages=[4, 1])
    second = Answer(1, (7, 8), sampling, 0, 5, token_ids=[9], pages=[0])  # preempted after one token
    batch = packed_prompts([first, second])
    assert batch.lengths == (70, 3)
    assert batch.token_ids_T.tolist() == [*range(70), 7, 8, 9]
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 73, 4, generator=generator).double()
    layout = PrefillLayout(batch, [first, second], arena)
    options = {"scaling": 0.3, "sliding_window": None, "softcap": None}
    out = layout.attend(SimpleNamespace(layer_idx=1), query, key, value, **options)
    torch.testing.assert_close(out, PackedLayout.of(batch).attend(None, query, key, value, **options))
    places = [(4, t) if t < 64 else (1, t - 64) for t in range(70)] + [(0, t) for t in range(3)]
    for stored, new in zip(arena.tiles(1, 6), (key, value), strict=True):
        pages = stored.view(6, 2, 64, 4)
        for token, (page, offset) in enumerate(places):
            assert torch.equal(pages[page, :, offset], new[0, :, token])
