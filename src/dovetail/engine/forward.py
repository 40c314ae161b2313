"""The two forwards over pages, module by module: prompts packed end to end, and one new token for every sequence.

Responsible for: the Hugging Face modules as the engine calls them (packed ids and positions in, next-token logits
out, in evaluation mode with attention over paged keys), and the draws on their way to the host.
Not responsible for: drawing (sampling.py), which sequences run (scheduler.py), models that cannot be called so
(padded.py).

On a GPU the fused step (fused.py), which reads the same parameters, decodes where it agrees with these modules.

Attention reads the pages without a special kernel. Gathering each sequence's pages into a padded tensor
would copy the whole cache for every token (measured on a CPU: 5 to 20 times the cost of the attention
itself), and a contiguous slot for each sequence would reserve and mostly read padding. So the work is laid
out by page rather than by sequence: the used pages are the first n of the arena (kv_cache.py), hence one
batched product in place

    scores[page, head, offset] = query[owner of page, head] . key[page, head, offset]

reads every key once, ragged lengths without padding. Only the scores, smaller than the keys by the head
width, are regrouped by sequence for the softmax, with the length (or window) mask; the weights go back to the
page order for the product with the values, and one small product with the page-owner matrix adds the pages of
each sequence up. A page that several sequences share is read once for all of them, with as many queries. On the
CPU this equals scaled_dot_product_attention over contiguous slots for even lengths
and is faster for ragged or grouped ones. Grouped-query heads share the key block of their group. A device kernel
that walks the page tables can replace `DecodeLayout.attend` without touching anything else.

A sequence that is alone in its arena has its keys in one piece and needs none of this: `LoneLayout`.

Prompts are read whole or in parts. A part attends to the earlier tokens of its sequence, which are in pages: they are
gathered, with its own, into packed keys and values. Where every sequence is read from its beginning nothing is
gathered, and attention is that of training.

Shapes: B running sequences (one new token each), P used pages, M most owners of a page, Q = P x M, N pages of the
longest, T packed tokens to read, L longest part, M also the longest sequence so far, H query heads, C key heads, G
query heads per key head, K head width, O the 64 places of a page.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel

from dovetail.batches import PackedBatch, cumulative, pack
from dovetail.engine.kv_cache import PAGE_TOKENS, KVArena, KVShape
from dovetail.engine.sampling import SamplingRows, likeliest_next, sample_next
from dovetail.engine.scheduler import Answer, Chunk, Listener, TopLogprobs
from dovetail.errors import GenerationError
from dovetail.model.attention import (
    ATTENTION_NAME,
    AttentionCall,
    Layout,
    PackedLayout,
    flash_attention,
    flash_can,
    padded_attention,
    use_packed_attention,
)
from dovetail.model.forward import evaluation_mode, vocabulary_of
from dovetail.model.linear_logprobs import head_of
from dovetail.model.lora import adapters_in_use
from dovetail.model.plain_forward import without_extras
from dovetail.model.rope import reread_at, rope_limit
from dovetail.parallel.tensor_plan import Place
from dovetail.parallel.world import WHOLE, TensorGroup


class PackedModules:
    """A model whose attention is Dovetail's registered function, hence works over packed batches."""

    def __init__(self, model: PreTrainedModel, group: TensorGroup = WHOLE) -> None:
        """Keep the model and `group`, the processes that compute it together if its weights are slices.

        Slices: parallel/tensor.py.
        """
        self.model = model
        self.group = group
        head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
        self.vocabulary = int(head.weight.shape[0]) if group.size == 1 else vocabulary_of(model)
        """The number of logits."""
        self._rows = [Place(rank, group.size).vocabulary(self.vocabulary)[1] for rank in range(group.size)]
        self.name = type(model).__name__
        self._without_extras = without_extras(model)
        self.rope_limit = rope_limit(model)
        """The longest sequence read with the rope of short ones; None if all lengths have the same rope."""
        self.cannot_be_captured = False
        """True after a capture failed: the forward does what a CUDA graph cannot record."""
        self.why_not_fused: str | None = None
        """The reason why the modules decode on a GPU, given in a warning when it was found (graphs.py)."""
        self.captured: Any = None
        """The decoder whose graphs were recorded from these modules, for the next block (graphs.py)."""

    def rereads_at(self, length: int) -> bool:
        """Return whether a sequence that grows to this length must be read anew, with other rope frequencies."""
        return self.rope_limit is not None and length > self.rope_limit and reread_at(self.model, length)

    def recorded_state(self) -> tuple[Any, ...]:
        """Return what a graph of the forward fixes: the addresses of weights and buffers, and the adapters in use."""
        tensors = chain(self.model.parameters(), self.model.buffers())
        return tuple(tensor.data_ptr() for tensor in tensors), adapters_in_use(self.model)

    @contextmanager
    def our_attention(self) -> Iterator[None]:
        """Make the model attend through `layout.attend` within the block; restore its attention afterwards."""
        before = self.model.config._attn_implementation
        if before == ATTENTION_NAME:
            yield
            return
        use_packed_attention(self.model)
        try:
            yield
        finally:
            self.model.set_attn_implementation(before)

    def next_logits(
        self, ids_T: Tensor, positions_T: Tensor, layout: Layout, last_S: Tensor | None = None
    ) -> Tensor:
        """Return logits [S, V] of what follows the tokens `last_S` (all T if None); only these go through the head."""
        if ids_T.is_cuda:
            # The head is that of training, whose product leaves the tensor cores in float32.
            hidden_TD = self._forward(self.model.base_model, ids_T, positions_T, layout).last_hidden_state[0]
            logits = head_of(self.model).logits(hidden_TD if last_S is None else hidden_TD[last_S])
        else:
            options = {"logits_to_keep": 0 if last_S is None else last_S, **self._without_extras}
            logits = self._forward(self.model, ids_T, positions_T, layout, **options).logits[0]
        return self.group.columns(logits, self._rows)

    def from_first(self, ids_S: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Return the results of `draw_next` in the group's first process, since sums may round otherwise in each."""
        if self.group.size == 1:
            return ids_S, numbers
        numbers = self.group.from_first(numbers.contiguous())
        return numbers[0].long(), numbers

    def _forward(
        self, module: Any, ids_T: Tensor, positions_T: Tensor, layout: Layout, **options: Any
    ) -> Any:
        return module(
            input_ids=ids_T[None],
            position_ids=positions_T[None],
            # transformers hands a mask of four dimensions through unread. Without one, its classes look for
            # packed sequences in the positions themselves, which waits for the device in every forward.
            attention_mask=torch.zeros(1, 1, 1, 1, device=ids_T.device),
            use_cache=False,
            layout=layout,
            **options,
        )

    def kv_shape(self) -> KVShape | None:
        """Return the sizes of one token's keys and values, found by running one; None if a layer bypasses the layout.

        Running the modules, not reading the config, proves for any architecture that each layer uses Dovetail's
        attention.
        """
        probe = _Probe()
        device = next(self.model.parameters()).device
        with torch.no_grad(), evaluation_mode(self.model), self.our_attention():
            zero_T = torch.zeros(1, dtype=torch.long, device=device)
            self.next_logits(zero_T, zero_T, probe)
        num_layers = self.model.config.get_text_config().num_hidden_layers
        if sorted(probe.shapes) != list(range(num_layers)) or len(set(probe.shapes.values())) != 1:
            return None
        heads, width, dtype = probe.shapes[0]
        return KVShape(num_layers=num_layers, num_heads=heads, head_width=width, dtype=dtype)


class _Probe:
    """A layout for one token that notes what each layer would store."""

    def __init__(self) -> None:
        self.shapes: dict[int, tuple[int, int, torch.dtype]] = {}

    def attend(self, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall) -> Tensor:
        """Note the shapes, and return the value: that is attention of a token to itself alone."""
        if key.shape == value.shape:
            self.shapes[call.layer] = (key.shape[1], key.shape[3], key.dtype)
        return value.repeat_interleave(query.shape[1] // value.shape[1], dim=1).transpose(1, 2)


def expect_causal_lm(model: PreTrainedModel) -> None:
    """Raise GenerationError for models without a next-token head."""
    if model.get_output_embeddings() is None:  # type: ignore[no-untyped-call]
        raise GenerationError(
            f"{type(model).__name__} has no language-model head, so it cannot generate",
            hint="load it with AutoModelForCausalLM",
        )


def to_device(values: Sequence[int], device: torch.device, dtype: torch.dtype = torch.long) -> Tensor:
    """Return the numbers as a tensor on the device.

    A small copy from unpinned memory is staged, so that the host need not wait, or keep the source.
    """
    return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)


@dataclass(frozen=True, slots=True)
class Draw:
    """Tokens on their way to the host, one for each answer."""

    answers: Sequence[Answer]
    numbers: Tensor
    """float64 [N, S] on the host, token ids exact up to 2^53; valid after `arrived`."""
    arrived: torch.cuda.Event | None

    @classmethod
    def of(cls, answers: Sequence[Answer], numbers: Tensor) -> Draw:
        """Send float64 [N, S] on its way, and count a token of each answer as pending."""
        for answer in answers:
            answer.num_pending += 1
        if not numbers.is_cuda:
            return cls(answers, numbers, None)
        host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
        host.copy_(numbers, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return cls(answers, host, event)

    def deliver(self, listener: Listener) -> None:
        """Wait for the numbers and hand each answer its token; answers that have ended take none."""
        if self.arrived is not None:
            self.arrived.synchronize()
        ids, logprobs, *likeliest = self.numbers.tolist()
        columns = zip(*likeliest, strict=True) if likeliest else [()] * len(ids)
        for answer, token_id, logprob, column in zip(self.answers, ids, logprobs, columns, strict=True):
            answer.num_pending -= 1
            if answer.finish_reason is None:
                answer.accept(int(token_id), logprob, listener, _pairs(column))


def draw_next(logits_SV: Tensor, rows: SamplingRows) -> tuple[Tensor, Tensor]:
    """Return the next token ids [S], and the numbers of a `Draw`, float64 [N, S]."""
    ids_S, logprobs_S = sample_next(logits_SV, rows)
    numbers = torch.stack([ids_S.double(), logprobs_S.double()])
    if not rows.num_likeliest:
        return ids_S, numbers
    ids_SK, logprobs_SK = likeliest_next(logits_SV, rows, min(rows.num_likeliest, logits_SV.shape[1]))
    return ids_S, torch.cat([numbers, ids_SK.T.double(), logprobs_SK.T.double()])


def _pairs(column: Sequence[float]) -> TopLogprobs:
    half = len(column) // 2
    return [
        (int(token_id), logprob)
        for token_id, logprob in zip(column[:half], column[half:], strict=True)
        if logprob > -math.inf
    ]


class PageMap:
    """The sequences that each page belongs to, as index tensors; built when a table changes, not every step."""

    def __init__(self, tables: Sequence[Sequence[int]], device: torch.device) -> None:
        owners: dict[int, list[tuple[int, int]]] = {}
        for b, row in enumerate(tables):
            for n, page in enumerate(row):
                owners.setdefault(page, []).append((b, n))
        self.num_rows = len(tables)
        self.num_pages = max(owners) + 1  # those between belong to prompts that are still being read
        self.width = max(map(len, tables))
        self.num_owners = max(map(len, owners.values()))
        table = [0] * (self.num_rows * self.width)
        owner, place = [0] * (self.num_pages * self.num_owners), [0] * (self.num_pages * self.num_owners)
        self._owned: list[int] = []
        for page, found in owners.items():
            for m, (b, n) in enumerate(found):
                q = page * self.num_owners + m
                owner[q], place[q] = b, b * self.width + n
                table[b * self.width + n] = q
                self._owned.append(q)
        self.in_order = table == list(range(self.num_pages))
        """True where pages lie in the order of the sequences, unshared and without padding: nothing is regrouped."""
        self.all_owned = len(self._owned) == len(owner)
        """True where every page up to the last belongs to these sequences, each to equally many."""
        self.table_BN = torch.tensor(table, device=device)
        self.owner_Q = torch.tensor(owner, device=device)
        self.place_Q = torch.tensor(place, device=device)
        self.offsets_L = torch.arange(self.width * PAGE_TOKENS, device=device)
        self._owns: dict[torch.dtype, Tensor] = {}

    def ownership(self, dtype: torch.dtype) -> Tensor:
        """Return [B, Q]: 1 where the page belongs to the sequence, else 0."""
        if dtype not in self._owns:
            owned = torch.tensor(self._owned, device=self.owner_Q.device)
            owns_BQ = torch.zeros(self.num_rows, len(self.owner_Q), dtype=dtype, device=owned.device)
            owns_BQ[self.owner_Q[owned], owned] = 1
            self._owns[dtype] = owns_BQ
        return self._owns[dtype]


class DecodeLayout:
    """The attention of one decode step; registered attention calls `attend` in every layer."""

    def __init__(self, arena: KVArena, pages: PageMap, rows_HB: Tensor, lengths_B: Tensor) -> None:
        """Keep `rows_HB`, where the new tokens go, and `lengths_B`, of the sequences with their new tokens."""
        self._arena = arena
        self._pages = pages
        self._rows_HB = rows_HB
        self._lengths_B1 = lengths_B[:, None]
        self._masks: dict[int | None, Tensor] = {}

    def attend(self, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall) -> Tensor:
        """Store key and value [1, kv heads, B, K], attend with query [1, H, B, K]; returns [1, B, H, K]."""
        self._arena.write(call.layer, key, value, self._rows_HB)
        keys, values = self._arena.tiles(call.layer, self._pages.num_pages)
        scale = call.scale(query.shape[-1])
        scores_BHL = self._scores(query[0].transpose(0, 1), keys)
        if call.softcap is not None:
            scores_BHL = call.softcap * torch.tanh(scores_BHL.to(self._mask_dtype) * (scale / call.softcap))
            scale = 1.0
        # float32 for half precision as well: the mask's type decides.
        scores_BHL = torch.add(self._mask(call.window), scores_BHL, alpha=scale)
        return self._mix(scores_BHL.softmax(dim=-1).to(values.dtype), values)[None]

    def _scores(self, query_BHK: Tensor, keys: Tensor) -> Tensor:
        """Multiply each query with all its keys: [B, H, N x 64]; scores beyond the sequence are meaningless."""
        pages, (num_rows, num_heads, _) = self._pages, query_BHK.shape
        query_QHK = query_BHK if pages.in_order and pages.width == 1 else query_BHK[pages.owner_Q]
        query_tiles = self._by_key_head(query_QHK, keys.shape[0])
        scores_QHO = self._by_owner(torch.bmm(query_tiles, keys.transpose(1, 2)), num_heads)
        scores = scores_QHO if pages.in_order else scores_QHO[pages.table_BN]
        grouped = scores.view(num_rows, pages.width, num_heads, PAGE_TOKENS)
        return grouped.transpose(1, 2).reshape(num_rows, num_heads, -1)

    def _mix(self, weights_BHL: Tensor, values: Tensor) -> Tensor:
        """Return the values of each sequence, weighted and summed [B, H, K]."""
        pages, (num_rows, num_heads, _) = self._pages, weights_BHL.shape
        grouped = weights_BHL.view(num_rows, num_heads, pages.width, PAGE_TOKENS).transpose(1, 2)
        weights = grouped.reshape(-1, num_heads, PAGE_TOKENS)
        weights_QHO = weights if pages.in_order else weights[pages.place_Q]
        mixed = torch.bmm(self._by_key_head(weights_QHO, values.shape[0]), values)
        mixed_QHK = self._by_owner(mixed, num_heads)
        if pages.width == 1 and pages.num_owners == 1:
            return mixed_QHK if pages.in_order else mixed_QHK[pages.table_BN]
        if num_rows == 1 and pages.all_owned:
            return mixed_QHK.sum(dim=0, keepdim=True)
        # A product rather than index_add: it adds in a fixed order on every device.
        summed = pages.ownership(mixed.dtype) @ mixed_QHK.reshape(len(mixed_QHK), -1)
        return summed.view(num_rows, num_heads, -1)

    def _by_key_head(self, x_QHX: Tensor, num_tiles: int) -> Tensor:
        """Regroup [Q, H, X] to [P x C, M x G, X]: everything that is multiplied with one block of keys or values."""
        num_owners, num_key_heads = self._pages.num_owners, self._arena.shape.num_heads
        if num_owners > 1:
            x_PMCGX = x_QHX.view(
                -1, num_owners, num_key_heads, x_QHX.shape[1] // num_key_heads, x_QHX.shape[2]
            )
            x_QHX = x_PMCGX.transpose(1, 2)
        return x_QHX.reshape(num_tiles, -1, x_QHX.shape[-1])

    def _by_owner(self, x: Tensor, num_heads: int) -> Tensor:
        """Regroup [P x C, M x G, X] to [Q, H, X]: the inverse of `_by_key_head`."""
        num_owners, num_key_heads = self._pages.num_owners, self._arena.shape.num_heads
        if num_owners > 1:
            x = x.view(-1, num_key_heads, num_owners, num_heads // num_key_heads, x.shape[-1]).transpose(1, 2)
        return x.reshape(self._pages.num_pages * num_owners, num_heads, x.shape[-1])

    @property
    def _mask_dtype(self) -> torch.dtype:
        return torch.float64 if self._arena.shape.dtype == torch.float64 else torch.float32

    def _mask(self, window: int | None) -> Tensor:
        """Return the mask [B, 1, N x 64]: 0 where the new token may attend, else the most negative number.

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


class LoneLayout:
    """The attention of one decode step of the only sequence there is: it reads the cache in place."""

    def __init__(self, arena: KVArena, rows_HB: Tensor, length: int) -> None:
        """Keep `rows_HB`, where the new token goes, and `length`, of the sequence with it."""
        self._arena = arena
        self._rows_HB = rows_HB
        self._length = length

    def attend(self, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall) -> Tensor:
        """Store key and value [1, kv heads, 1, K], attend with query [1, H, 1, K]; returns [1, 1, H, K]."""
        self._arena.write(call.layer, key, value, self._rows_HB)
        start = 0 if call.window is None else max(0, self._length - call.window)
        keys, values = self._arena.sequence(call.layer, start, self._length)
        # The queries that share a key head are as many queries of that head, and all attend to everything.
        query_1CGK = query.reshape(1, keys.shape[1], -1, query.shape[-1])
        if call.softcap is None:
            out_1CGK = scaled_dot_product_attention(query_1CGK, keys, values, scale=call.scaling)
        else:
            everything = torch.ones(1, dtype=torch.bool, device=query.device)
            out_1CGK = padded_attention(query_1CGK, keys, values, call, allowed=everything)
        return out_1CGK.reshape(1, 1, -1, query.shape[-1])


class EagerDecoder:
    """A decode step, module by module; between two steps the host reads the tokens drawn."""

    lag = 0
    """The number of draws that may be under way while the next step begins."""

    def __init__(self, modules: PackedModules, arena: KVArena, device: torch.device) -> None:
        self._modules = modules
        self._arena = arena
        self._device = device
        self._answers: list[Answer] = []
        self._version = -1
        self._ids_B = torch.zeros(0, dtype=torch.long, device=device)
        self._positions_B = self._ids_B

    def place(self, answers: Sequence[Answer], ids_S: Tensor) -> None:
        """Do nothing for answers that drew their first token: the host will know it by the next step."""

    def forget(self, answers: Sequence[Answer]) -> None:
        """Drop the batch if it holds one of these answers, which end or are read anew; the next step builds another."""
        if any(answer in self._answers for answer in answers):
            self._answers = []

    def step(self, answers: Sequence[Answer], version: int) -> Draw:
        """Feed every answer its last token and draw the next. `version` changes with the page tables."""
        if list(answers) != self._answers:
            self._start(answers)
        elif version != self._version:
            self._remap()
        self._version = version
        logits_BV = self._modules.next_logits(self._ids_B, self._positions_B, self._layout())
        ids_B, numbers = self._modules.from_first(*draw_next(logits_BV, self._sampling))
        self._ids_B = ids_B
        self._positions_B += 1
        self._rows_HB += 1
        self._sampling.advance(ids_B)
        return Draw.of(answers, numbers)

    def _layout(self) -> Layout:
        if self._arena.lone:
            return LoneLayout(self._arena, self._rows_HB, self._answers[0].num_tokens)
        return DecodeLayout(self._arena, self._pages, self._rows_HB, self._positions_B + 1)

    def _start(self, answers: Sequence[Answer]) -> None:
        self._answers = list(answers)
        self._ids_B = torch.tensor([answer.token_ids[-1] for answer in answers], device=self._device)
        self._positions_B = torch.tensor([answer.num_tokens - 1 for answer in answers], device=self._device)
        self._sampling = sampling_rows(answers, self._modules.vocabulary, self._device)
        self._remap()

    def _remap(self) -> None:
        """Take over page tables that have changed."""
        self._pages = PageMap([answer.pages for answer in self._answers], self._device)
        lasts = [divmod(answer.num_tokens - 1, PAGE_TOKENS) for answer in self._answers]
        pages = [answer.pages[page] for answer, (page, _) in zip(self._answers, lasts, strict=True)]
        pages_B = torch.tensor(pages, device=self._device)
        self._rows_HB = self._arena.rows_of(
            pages_B, torch.tensor([offset for _, offset in lasts], device=self._device)
        )


def sampling_rows(answers: Sequence[Answer], vocabulary: int, device: torch.device) -> SamplingRows:
    """Return the sampling settings of some answers, each at the random number of its next token."""
    rows = SamplingRows.of(
        [answer.sampling for answer in answers],
        [answer.seed for answer in answers],
        [answer.num_drawn for answer in answers],
        device=device,
    )
    if rows.penalises:
        rows.remember([answer.all_ids for answer in answers], vocabulary)
    return rows


class Prefill:
    """The inputs of the modules for one forward over some parts of sequences; also its attention layout."""

    def __init__(self, chunks: Sequence[Chunk], arena: KVArena, device: torch.device) -> None:
        self._arena = arena
        self._chunks = chunks
        ids = [chunk.answer.all_ids[chunk.start : chunk.end] for chunk in chunks]
        batch: PackedBatch = pack(ids, [[False] * len(part) for part in ids]).to(device)
        self.ids_T = batch.token_ids_T
        self._asking = PackedLayout.of(batch)
        starts = [chunk.start for chunk in chunks]
        self._reads_pages = any(starts)
        self._starts_S = to_device(starts, device)
        self.positions_T = batch.position_ids_T()
        if self._reads_pages:
            lengths_S = to_device(batch.lengths, device)
            self.positions_T += self._starts_S.repeat_interleave(lengths_S, output_size=batch.num_tokens)
        lengths = [chunk.answer.num_tokens for chunk in chunks]
        self.lengths_T = to_device(lengths, device).repeat_interleave(
            to_device(batch.lengths, device), output_size=batch.num_tokens
        )
        """The length of each token's sequence, with what is not read yet."""
        self._rows_HT = _rows(arena, chunks, batch.lengths, self.positions_T)
        ends = tuple(chunk.end for chunk in chunks)
        self._asked = self._asking
        if self._reads_pages:
            bounds_S1 = to_device(cumulative(ends), device, torch.int32)
            self._asked = PackedLayout(bounds_S1, ends)
            places_T = torch.cat([torch.arange(end) for end in ends]).to(device, non_blocking=True)
            self._past_HT = _rows(arena, chunks, ends, places_T)
        self._masks: dict[int | None, Tensor] = {}

    def last_index_S(self) -> Tensor:
        """Return the places in T, int64, of the last tokens of the parts that end their sequence."""
        bounds = cumulative([chunk.num_tokens for chunk in self._chunks])
        last = [bound - 1 for chunk, bound in zip(self._chunks, bounds[1:], strict=True) if chunk.is_last]
        return to_device(last, self.ids_T.device)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall) -> Tensor:
        """Store key and value [1, kv heads, T, K]; returns causal attention [1, T, H, K]."""
        self._arena.write(call.layer, key, value, self._rows_HT)
        if not self._reads_pages:
            return self._asking.attend(query, key, value, call)
        keys, values = self._arena.read(call.layer, self._past_HT)
        if call.softcap is None and flash_can(query, values):
            return flash_attention(query, keys, values, self._asking, self._asked, call)
        out_SHLK = padded_attention(
            self._asking.padded(query),
            self._asked.padded(keys),
            self._asked.padded(values),
            call,
            allowed=self._allowed(call.window),
        )
        return self._asking.packed(out_SHLK)

    def _allowed(self, window: int | None) -> Tensor:
        """Return bool [S, 1, L, M], True where a token may attend; padding attends as the last token does."""
        if window not in self._masks:
            device = self.ids_T.device
            lengths_S1 = to_device([chunk.num_tokens for chunk in self._chunks], device)[:, None]
            columns_L = torch.arange(self._asking.max_length, device=device)
            query_SL1 = (self._starts_S[:, None] + torch.minimum(columns_L, lengths_S1 - 1))[..., None]
            key_M = torch.arange(self._asked.max_length, device=device)
            allowed = key_M <= query_SL1
            if window is not None:
                allowed &= key_M > query_SL1 - window
            self._masks[window] = allowed[:, None]
        return self._masks[window]


def _rows(arena: KVArena, chunks: Sequence[Chunk], lengths: Sequence[int], places_T: Tensor) -> Tensor:
    """Return row numbers in the arena of tokens at these places, `lengths` of them for each sequence in turn."""
    device = places_T.device
    width = max(len(chunk.answer.pages) for chunk in chunks)
    table = [
        page for chunk in chunks for page in (*chunk.answer.pages, *[0] * (width - len(chunk.answer.pages)))
    ]
    table_SN = to_device(table, device).view(len(chunks), width)
    sequence_T = torch.arange(len(chunks), device=device).repeat_interleave(
        to_device(lengths, device), output_size=len(places_T)
    )
    return arena.rows_of(table_SN[sequence_T, places_T // PAGE_TOKENS], places_T % PAGE_TOKENS)
