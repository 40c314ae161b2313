"""One new token for every running sequence: the batch's device-side state and its attention over pages.

Responsible for: what a decode step feeds the modules, and attention of one query a sequence over paged keys.
Not responsible for: the modules (modules.py), drawing (sampling.py), or who runs (scheduler.py).

How attention reads the pages without a special kernel. Gathering each sequence's pages into a padded tensor
would copy the whole cache for every token (measured on a CPU: 5 to 20 times the cost of the attention
itself), and a contiguous slot for each sequence would reserve and mostly read padding. So the work is laid
out by page rather than by sequence: the used pages are the first n of the arena (kv_cache.py), hence one
batched product in place

    scores[page, head, offset] = query[owner of page, head] . key[page, head, offset]

reads every key once, ragged lengths without padding. Only the scores, smaller than the keys by the head
width, are regrouped by sequence for the softmax, with the length (or window) mask; the weights go back to the
page order for the product with the values, and one small product with the page-owner matrix adds the pages of
each sequence up. On the CPU this equals scaled_dot_product_attention over contiguous slots for even lengths
and is faster for ragged or grouped ones; for a single sequence it equals the cache concatenation and
attention of transformers. Grouped-query heads share the key block of their group. A device kernel that walks
the page tables can replace `DecodeLayout.attend` without touching anything else.

Shapes: B running sequences (one new token each), P used pages, N pages of the longest, H query heads, K head
width; G query heads per key head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dovetail.engine.answers import Answer
from dovetail.engine.kv_cache import PAGE_TOKENS, KVArena
from dovetail.engine.sampling import SamplingRows


class PageMap:
    """Which page belongs to which sequence, as index tensors; built when a table changes, not every step."""

    def __init__(self, tables: Sequence[Sequence[int]], device: torch.device) -> None:
        self.num_rows = len(tables)
        self.num_pages = sum(map(len, tables))
        self.width = max(map(len, tables))
        table = [page for row in tables for page in (*row, *[0] * (self.width - len(row)))]
        self.in_order = table == list(range(self.num_pages))
        """Pages lie in the order of the sequences, without padding: nothing to regroup."""
        owner, place = [0] * self.num_pages, [0] * self.num_pages
        for b, row in enumerate(tables):
            for n, page in enumerate(row):
                owner[page], place[page] = b, b * self.width + n
        self.table_BN = torch.tensor(table, device=device)
        self.owner_P = torch.tensor(owner, device=device)
        self.place_P = torch.tensor(place, device=device)
        self.offsets_L = torch.arange(self.width * PAGE_TOKENS, device=device)
        self._owns: dict[torch.dtype, Tensor] = {}

    def ownership(self, dtype: torch.dtype) -> Tensor:
        """[B, P]: 1 where the page belongs to the sequence, else 0."""
        if dtype not in self._owns:
            zeros_BP = torch.zeros(self.num_rows, self.num_pages, dtype=dtype, device=self.owner_P.device)
            self._owns[dtype] = zeros_BP.scatter_(0, self.owner_P[None], 1)
        return self._owns[dtype]


class DecodeLayout:
    """The attention of one decode step; registered attention calls `attend` in every layer."""

    def __init__(self, arena: KVArena, pages: PageMap, rows_HB: Tensor, lengths_B: Tensor) -> None:
        """`rows_HB`: where the new tokens go; `lengths_B`: of the sequences with their new tokens."""
        self._arena = arena
        self._pages = pages
        self._rows_HB = rows_HB
        self._lengths_B1 = lengths_B[:, None]
        self._masks: dict[int | None, Tensor] = {}

    def attend(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scaling: float | None,
        sliding_window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """Store key and value [1, kv heads, B, K], attend with query [1, H, B, K]; returns [1, B, H, K]."""
        layer: int = module.layer_idx
        self._arena.write(layer, key, value, self._rows_HB)
        keys, values = self._arena.tiles(layer, self._pages.num_pages)
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        scores_BHL = self._scores(query[0].transpose(0, 1), keys)
        if softcap is not None:
            scores_BHL = softcap * torch.tanh(scores_BHL.to(self._mask_dtype) * (scale / softcap))
            scale = 1.0
        # float32 for half precision as well: the mask's type decides.
        scores_BHL = torch.add(self._mask(sliding_window), scores_BHL, alpha=scale)
        return self._mix(scores_BHL.softmax(dim=-1).to(values.dtype), values)[None]

    def _scores(self, query_BHK: Tensor, keys: Tensor) -> Tensor:
        """Each query with all its keys [B, H, N x 64]; what lies beyond the sequence is meaningless."""
        pages, (num_rows, num_heads, head_width) = self._pages, query_BHK.shape
        query_PHK = query_BHK if pages.in_order and pages.width == 1 else query_BHK[pages.owner_P]
        query_tiles = query_PHK.reshape(keys.shape[0], -1, head_width)
        scores_PHO = torch.bmm(query_tiles, keys.transpose(1, 2)).view(
            pages.num_pages, num_heads, PAGE_TOKENS
        )
        scores = scores_PHO if pages.in_order else scores_PHO[pages.table_BN]
        grouped = scores.view(num_rows, pages.width, num_heads, PAGE_TOKENS)
        return grouped.transpose(1, 2).reshape(num_rows, num_heads, -1)

    def _mix(self, weights_BHL: Tensor, values: Tensor) -> Tensor:
        """The values of each sequence, weighted and summed [B, H, K]."""
        pages, (num_rows, num_heads, _) = self._pages, weights_BHL.shape
        grouped = weights_BHL.view(num_rows, num_heads, pages.width, PAGE_TOKENS).transpose(1, 2)
        weights = grouped.reshape(-1, num_heads, PAGE_TOKENS)
        weights_PHO = weights if pages.in_order else weights[pages.place_P]
        mixed = torch.bmm(weights_PHO.reshape(values.shape[0], -1, PAGE_TOKENS), values)
        mixed_PHK = mixed.view(pages.num_pages, num_heads, -1)
        if pages.width == 1:
            return mixed_PHK if pages.in_order else mixed_PHK[pages.table_BN]
        if num_rows == 1:
            return mixed_PHK.sum(dim=0, keepdim=True)
        # A product rather than index_add: it adds in a fixed order on every device.
        summed = pages.ownership(mixed.dtype) @ mixed_PHK.view(pages.num_pages, -1)
        return summed.view(num_rows, num_heads, -1)

    @property
    def _mask_dtype(self) -> torch.dtype:
        return torch.float64 if self._arena.shape.dtype == torch.float64 else torch.float32

    def _mask(self, window: int | None) -> Tensor:
        """[B, 1, N x 64]: 0 where the new token may look, else the most negative number.

        Not -inf: the mask is made by multiplication, and 0 x -inf is NaN. The weight is exactly 0 either way.
        One mask a step serves all layers that share the window.
        """
        if window not in self._masks:
            hidden_BL = self._pages.offsets_L >= self._lengths_B1
            if window is not None:
                hidden_BL |= self._pages.offsets_L < self._lengths_B1 - window
            mask_BL = hidden_BL.to(self._mask_dtype).mul_(torch.finfo(self._mask_dtype).min)
            self._masks[window] = mask_BL[:, None]
        return self._masks[window]


class DecodeBatch:
    """The running sequences as the device sees them; advanced in place, rebuilt when others run."""

    def __init__(
        self, answers: Sequence[Answer], arena: KVArena, vocabulary: int, device: torch.device
    ) -> None:
        self.answers = list(answers)
        self._arena = arena
        self._device = device
        self.ids_B = torch.tensor([answer.token_ids[-1] for answer in answers], device=device)
        self.positions_B = torch.tensor([answer.num_tokens - 1 for answer in answers], device=device)
        self.sampling = sampling_rows(answers, vocabulary, device)
        self.remap()

    def remap(self) -> None:
        """Take over page tables that have changed."""
        answers = self.answers
        self._pages = PageMap([answer.pages for answer in answers], self._device)
        lasts = [divmod(answer.num_tokens - 1, PAGE_TOKENS) for answer in answers]
        pages = [answer.pages[page] for answer, (page, _) in zip(answers, lasts, strict=True)]
        pages_B = torch.tensor(pages, device=self._device)
        self._rows_HB = self._arena.rows_of(
            pages_B, torch.tensor([offset for _, offset in lasts], device=self._device)
        )

    def layout(self) -> DecodeLayout:
        """Attention for feeding `ids_B` at `positions_B`."""
        return DecodeLayout(self._arena, self._pages, self._rows_HB, self.positions_B + 1)

    def advance(self, ids_B: Tensor) -> None:
        """After a draw: the next step feeds the drawn tokens, one place further in the same pages."""
        self.ids_B = ids_B
        self.positions_B += 1
        self._rows_HB += 1
        self.sampling.advance(ids_B)


def sampling_rows(answers: Sequence[Answer], vocabulary: int, device: torch.device) -> SamplingRows:
    """The sampling settings of some answers, each at the random number of its next token."""
    rows = SamplingRows(
        [answer.sampling for answer in answers],
        [answer.seed for answer in answers],
        [len(answer.token_ids) for answer in answers],
        device=device,
    )
    if rows.penalises:
        rows.remember([answer.all_ids for answer in answers], vocabulary)
    return rows
