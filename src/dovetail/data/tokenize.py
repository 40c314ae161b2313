"""Tokenise rows once, within the length limits; later runs read them from the cache.

Responsible for: the tokens of demonstrations, comparisons and plain text, what happens to rows that are too long,
prompts that fit, and the counts of all that.
Not responsible for: how a conversation becomes tokens (text/chat_format.py), files on disk (token_store.py).

Tokens are stored under a hash of the rows' content, the tokenizer, the template and the limits: an edited row
is tokenised anew. Tokens are memory-mapped int32; a row becomes a Python list when it is asked for.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from dovetail.config.data import DataConfig
from dovetail.data.blend import StageRows, blend_order
from dovetail.data.openings import faults_at_opening, opening_notes
from dovetail.data.records import Comparison, Demonstration, Message, Prompt, Record, Text
from dovetail.data.refusals import Refusals, with_refused
from dovetail.data.report import DataReport
from dovetail.data.shorten import shortened
from dovetail.data.token_store import Columns, ColumnWriter, Facts, key_of, stored
from dovetail.errors import DataError
from dovetail.text.chat_format import ChatFormat
from dovetail.text.template import RefusedByTemplateError

CHUNK_ROWS = 512
"""The number of rows that are tokenised together."""

_DTYPES = {
    "tokens": np.int32,  # of all sequences, end to end
    "mask": np.bool_,  # of demonstrations alone, as long as `tokens`
    "starts": np.int64,  # bounds of sequences in `tokens`
    "rows": np.int64,  # bounds of rows in `starts`: the answers of a comparison are one row
    "prompts": np.int32,  # of each comparison, the tokens of the prompt that stands before every answer
    "sources": np.int32,  # of each row, the index of its source
    "better": np.int32,  # of each pair, indices of answers
    "worse": np.int32,
    "margins": np.float32,
    "pairs": np.int64,  # bounds of rows in the three columns above
}

RecordT = TypeVar("RecordT", bound=Record)
EncodedT = TypeVar("EncodedT")
TokensT = TypeVar("TokensT")
Pair = tuple[int, int, float]


@dataclass(frozen=True, slots=True)
class _Tokenized(ABC, Generic[TokensT]):
    """The tokens of a stage's rows; rows[i] is read from the columns when it is asked for."""

    columns: Columns
    order: NDArray[np.int64]
    """The indices of stored rows that make one epoch, weights applied."""
    report: DataReport
    fingerprint: str
    """A hash that changes with the rows before they were tokenised."""

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[TokensT]:
        return (self[i] for i in range(len(self)))

    @abstractmethod
    def __getitem__(self, index: int) -> TokensT:
        """Return the tokens of a row."""

    def longest(self, count: int) -> list[int]:
        """Return the indices of the rows with most tokens, in all their sequences together, the longest first."""
        tokens = np.diff(self.columns["starts"][self.columns["rows"]])[self.order]
        return [int(index) for index in np.argsort(-tokens, kind="stable")[:count]]


@dataclass(frozen=True, slots=True)
class TokenizedRows(_Tokenized[tuple[list[int], list[bool]]]):
    """Sequences with masks of the tokens to learn: rows[i] is (token ids, mask)."""

    def __getitem__(self, index: int) -> tuple[list[int], list[bool]]:
        row = int(self.order[index])
        (ids,) = _sequences(self.columns, row)
        if len(self.columns["mask"]) == 0:  # plain text: everything
            return ids, [True] * len(ids)
        start = self.columns["starts"][self.columns["rows"][row]]
        return ids, self.columns["mask"][start : start + len(ids)].tolist()


@dataclass(frozen=True, slots=True)
class TokenizedComparisons(_Tokenized[tuple[list[list[int]], list[Pair]]]):
    """Answers and their pairs: rows[i] is (token ids of each answer, prompt included; pairs)."""

    def __getitem__(self, index: int) -> tuple[list[list[int]], list[Pair]]:
        row = int(self.order[index])
        first, last = self.columns["pairs"][row : row + 2]
        parts = [self.columns[name][first:last].tolist() for name in ("better", "worse", "margins")]
        return _sequences(self.columns, row), list(zip(*parts, strict=True))

    def prompt_tokens(self, index: int) -> int:
        """Return how many tokens stand before each answer of a row."""
        return int(self.columns["prompts"][self.order[index]])


def tokenize_demonstrations(
    rows: StageRows[Demonstration], chat: ChatFormat, config: DataConfig
) -> TokenizedRows:
    """Tokenise conversations with their loss masks.

    Every assistant turn that is learnt counts, its end-of-turn token included.
    """
    return TokenizedRows(*_tokenized("demonstrations", rows, chat, config, _encode_demonstrations))


def tokenize_comparisons(
    rows: StageRows[Comparison], chat: ChatFormat, config: DataConfig
) -> TokenizedComparisons:
    """Tokenise every answer behind its prompt, with the pairs. One answer that is too long makes its row too long."""
    return TokenizedComparisons(*_tokenized("comparisons", rows, chat, config, _encode_comparisons))


def tokenize_texts(rows: StageRows[Text], chat: ChatFormat, config: DataConfig) -> TokenizedRows:
    """Tokenise plain texts, each ended by the end-of-text token, in pieces of at most `max_tokens`; no text is lost."""
    return TokenizedRows(*_tokenized("texts", rows, chat, config, _encode_texts))


def fitting_prompts(rows: StageRows[Prompt], chat: ChatFormat, config: DataConfig) -> StageRows[Prompt]:
    """Return the prompts of at most `max_prompt_tokens` tokens, cut to that where `too_long` says so."""
    kept: list[Prompt] = []
    source_of: list[int] = []
    limit = _Limit(config.max_prompt_tokens, "max_prompt_tokens", config)
    refusals = Refusals(chat, strict=config.bad_rows == "strict")

    def encode(chunk: Sequence[Prompt], sources: Sequence[int]) -> list[list[int]]:
        return chat.encode_prompts([record.messages for record in chunk])

    for record, source, ids in _encoded(rows, refusals, encode):
        messages = limit.fit(record.messages, len(ids), 0, source, chat)
        if messages is not None:
            kept.append(replace(record, messages=messages))
            source_of.append(source)
    owners = np.array(source_of, dtype=np.int32)
    report = with_refused(rows, refusals.found).with_lengths(limit.too_long, limit.truncated)
    _expect_some(len(kept), report, f"max_prompt_tokens = {limit.tokens}")
    order = blend_order(owners, rows.weights, rows.seed)
    return replace(rows, records=kept, source_of=owners, order=order, report=report)


@dataclass(slots=True)
class _Limit:
    """The limit on the length of rows, and the counts of longer ones by index of the source."""

    tokens: int
    name: str
    config: DataConfig
    too_long: Counter[int] = field(default_factory=Counter)
    truncated: Counter[int] = field(default_factory=Counter)

    def fit(
        self, prompt: Sequence[Message], prompt_tokens: int, answer_tokens: int, source: int, chat: ChatFormat
    ) -> tuple[Message, ...] | None:
        """Return the prompt as it is or shortened so that the answer fits behind it; None if the row is left out."""
        num_tokens = prompt_tokens + answer_tokens
        if num_tokens <= self.tokens:
            return tuple(prompt)
        if self.config.too_long == "error":
            raise DataError(
                f"a row has {num_tokens} tokens, more than {self.name} = {self.tokens}; it begins "
                f"{prompt[0]['content'][:80]!r}",
                hint=f"raise data.{self.name}, or set data.too_long to drop or truncate_left",
            )
        cut = None
        if self.config.too_long == "truncate_left" and answer_tokens < self.tokens:
            cut = shortened(prompt, self.tokens - answer_tokens, chat)
        counter = self.too_long if cut is None else self.truncated
        counter[source] += 1
        return cut


@dataclass(frozen=True, slots=True)
class _Row:
    """One row as it is stored."""

    sequences: Sequence[Sequence[int]]
    mask: Sequence[bool] = ()
    pairs: Sequence[Pair] = ()
    prompt: Sequence[int] = ()
    """The tokens that all sequences of a comparison begin with."""


_Encode = Callable[[Sequence[RecordT], Sequence[int], ChatFormat, _Limit], Iterable[list[_Row]]]
"""The type of functions that turn each record of a chunk into rows: one, none, or several."""


def _encode_demonstrations(
    chunk: Sequence[Demonstration], sources: Sequence[int], chat: ChatFormat, limit: _Limit
) -> Iterator[list[_Row]]:
    encoded = chat.encode_conversations([record.messages for record in chunk])
    for record, (ids, mask), source in zip(chunk, encoded, sources, strict=True):
        if len(ids) <= limit.tokens:
            yield [_Row([ids], mask)]
            continue
        answer = record.messages[-1]
        num_answer = len(chat.answer_ids(answer["content"]))
        prompt = limit.fit(record.messages[:-1], len(ids) - num_answer, num_answer, source, chat)
        if prompt is None:
            yield []
        else:
            cut_ids, cut_mask = chat.conversation([*prompt, answer])
            yield [_Row([cut_ids], cut_mask)]


def _encode_comparisons(
    chunk: Sequence[Comparison], sources: Sequence[int], chat: ChatFormat, limit: _Limit
) -> Iterator[list[_Row]]:
    prompts = chat.encode_prompts([record.messages for record in chunk])
    answers = iter(chat.encode_answers([answer for record in chunk for answer in record.answers]))
    for record, prompt_ids, source in zip(chunk, prompts, sources, strict=True):
        own = [next(answers) for _ in record.answers]
        messages = limit.fit(record.messages, len(prompt_ids), max(map(len, own)), source, chat)
        if messages is None:
            yield []
        else:
            front = prompt_ids if messages == record.messages else chat.prompt_ids(messages)
            yield [_Row([front + ids for ids in own], pairs=record.better_than, prompt=front)]


def _encode_texts(
    chunk: Sequence[Text], sources: Sequence[int], chat: ChatFormat, limit: _Limit
) -> Iterator[list[_Row]]:
    for ids in chat.encode_texts([record.text for record in chunk]):
        pieces = [ids[start : start + limit.tokens] for start in range(0, len(ids), limit.tokens)]
        yield [_Row([piece]) for piece in pieces if len(piece) > 1]  # one token alone predicts nothing


def _tokenized(
    kind: str, rows: StageRows[RecordT], chat: ChatFormat, config: DataConfig, encode: _Encode[RecordT]
) -> tuple[Columns, NDArray[np.int64], DataReport, str]:
    """Return stored rows with the order of one epoch, report and fingerprint, from the cache if they are there."""

    def write(writer: ColumnWriter) -> Facts:
        limit = _Limit(config.max_tokens, "max_tokens", config)
        refusals = Refusals(chat, strict=config.bad_rows == "strict")
        ends = {"starts": 0, "rows": 0, "pairs": 0}
        for name, end in ends.items():
            writer.append(name, [end])
        opening = Counter[str]()
        for record, source, found in _encoded(
            rows, refusals, lambda chunk, sources: list(encode(chunk, sources, chat, limit))
        ):
            opening.update(faults_at_opening(record, chat))
            for row in found:
                _write_row(writer, row, source, ends)
        return {
            "too_long": dict(limit.too_long),
            "truncated": dict(limit.truncated),
            "refused": refusals.found,
            "opening": dict(opening),
        }

    limits = (config.max_tokens, config.too_long, config.bad_rows)
    key = key_of(kind, rows.fingerprint(), chat.fingerprint, *limits)
    columns, facts = stored(config.cache_dir, key, _DTYPES, write)
    counts = [{int(source): n for source, n in facts[name].items()} for name in ("too_long", "truncated")]
    report = with_refused(rows, facts["refused"]).with_lengths(*counts)
    report = report.with_notes(opening_notes(facts["opening"], chat))
    _expect_some(len(columns["sources"]), report, f"max_tokens = {config.max_tokens}")
    order = blend_order(columns["sources"], rows.weights, rows.seed)
    return columns, order, report, rows.fingerprint()


def _encoded(
    rows: StageRows[RecordT],
    refusals: Refusals,
    encode: Callable[[Sequence[RecordT], Sequence[int]], Sequence[EncodedT]],
) -> Iterator[tuple[RecordT, int, EncodedT]]:
    """Yield each record with its source and its encoded form, without those that the template refuses."""
    for start in range(0, len(rows.records), CHUNK_ROWS):
        stop = start + CHUNK_ROWS
        chunk, sources = rows.records[start:stop], rows.source_of[start:stop].tolist()
        try:
            encoded = encode(chunk, sources)
        except RefusedByTemplateError:
            kept = refusals.accepted(chunk, range(start, stop))
            chunk, sources = [chunk[i] for i in kept], [sources[i] for i in kept]
            encoded = encode(chunk, sources)
        else:
            refusals.num_accepted += len(chunk)
        yield from zip(chunk, sources, encoded, strict=True)
    refusals.finish()


def _write_row(writer: ColumnWriter, row: _Row, source: int, ends: dict[str, int]) -> None:
    for ids in row.sequences:
        ends["starts"] += len(ids)
        writer.append("starts", [ends["starts"]])
        writer.append("tokens", ids)
    ends["rows"] += len(row.sequences)
    ends["pairs"] += len(row.pairs)
    writer.append("rows", [ends["rows"]])
    writer.append("pairs", [ends["pairs"]])
    writer.append("prompts", [len(row.prompt)])
    writer.append("sources", [source])
    writer.append("mask", row.mask)
    for place, name in enumerate(("better", "worse", "margins")):
        writer.append(name, [pair[place] for pair in row.pairs])


def _sequences(columns: Columns, row: int) -> list[list[int]]:
    first, last = columns["rows"][row : row + 2]
    bounds = columns["starts"][first : last + 1]
    return [columns["tokens"][a:b].tolist() for a, b in pairwise(bounds)]


def _expect_some(kept: int, report: DataReport, limit: str) -> None:
    if kept == 0 and report.part == "train":
        raise DataError(
            f"no row of the stage {report.stage} fits {limit}: {'; '.join(report.lines())}",
            hint="raise the limit, or set data.too_long=truncate_left",
        )
