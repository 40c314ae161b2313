"""The rows of one stage, split and weighted over all sources.

Responsible for: which rows of which source a stage sees, in training and held out, and how often.
Not responsible for: reading one source (sources.py), the split's hash (split.py), tokens (tokenize.py).
"""

from __future__ import annotations

import hashlib
import math
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from dovetail.config.data import DataConfig, SourceConfig
from dovetail.data.conversations import has_empty_answer
from dovetail.data.records import (
    Comparison,
    Demonstration,
    Kind,
    Prompt,
    Record,
    Text,
    as_demonstration,
    as_prompt,
    kinds_of,
    prompt_key,
)
from dovetail.data.registry import resolve
from dovetail.data.report import DataReport, SourceCounts, Tally
from dovetail.data.sources import label_of, read_source
from dovetail.data.split import is_held_out, stage_of, unit_interval
from dovetail.errors import DataError

Part = Literal["train", "held_out"]
FEWEST_HELD_OUT = 10
"""The number of held-out rows below which a note is given: among 10, a share of 0.5 has a standard error of 0.16."""
LARGEST_FRACTION = 0.25
"""The largest fraction of the rows that a note proposes to hold out."""
RecordT = TypeVar("RecordT", bound=Record)


@dataclass(frozen=True, slots=True)
class StageRows(Sequence[RecordT], Generic[RecordT]):
    """The rows of a stage as a sequence, weights applied: rows of a source with a large weight occur often."""

    records: list[RecordT]
    """The rows, each one once."""
    source_of: NDArray[np.int32]
    """The index in `report.sources` of each record's source."""
    weights: tuple[float, ...] | None
    """Share of each source in the blend, or None: every row once."""
    order: NDArray[np.int64]
    """Indices into `records`: the rows of one epoch."""
    seed: int
    report: DataReport

    def __len__(self) -> int:
        return len(self.order)

    def fingerprint(self) -> str:
        """Return a hash of the rows and their order: another one if a row is added, removed, moved or changed."""
        content = hashlib.sha256(self.source_of.tobytes())
        for record in self.records:
            content.update(record.row_id.encode())
        return content.hexdigest()

    @overload
    def __getitem__(self, index: int) -> RecordT: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[RecordT]: ...
    def __getitem__(self, index: int | slice) -> RecordT | Sequence[RecordT]:
        if isinstance(index, slice):
            return [self.records[i] for i in self.order[index]]
        return self.records[int(self.order[index])]


@overload
def load_stage(config: DataConfig, kind: Literal["sft"], part: Part) -> StageRows[Demonstration]: ...
@overload
def load_stage(config: DataConfig, kind: Literal["reward"], part: Part) -> StageRows[Comparison]: ...
@overload
def load_stage(config: DataConfig, kind: Literal["ppo"], part: Part) -> StageRows[Prompt]: ...
@overload
def load_stage(config: DataConfig, kind: Literal["text"], part: Part) -> StageRows[Text]: ...
def load_stage(config: DataConfig, kind: Kind, part: Part) -> StageRows[Any]:
    """Load the rows of a stage, for training or held out, from every source that can serve it.

    Tables are read once, row by row; only the rows of this stage stay in memory. Held-out rows occur once
    each, at most `max_eval_rows` of them. Raises DataError if there is no row to train on.
    """
    records: list[Any] = []
    source_of: list[int] = []
    counts: list[SourceCounts] = []
    shares = sources_of(config, kind)
    for index, (source, split) in enumerate(shares):
        found, counted = _gather(source, split, kind, part, config)
        records += found
        source_of += [index] * len(found)
        counts.append(counted)
    report = DataReport(stage=kind, part=part, sources=tuple(counts))
    owners = np.array(source_of, dtype=np.int32)
    if part == "held_out":
        asked = [source for source, _ in shares]
        report = report.with_notes(_few_held_out(counts, asked, config.held_out_fraction))
        return _capped(records, owners, report, config)
    if not records:
        raise _nothing_to_learn_from(kind, report)
    weights = _weights([source for source, _ in shares])
    return StageRows(records, owners, weights, blend_order(owners, weights, config.seed), config.seed, report)


def blend_order(
    source_of: NDArray[np.int32], weights: Sequence[float] | None, seed: int
) -> NDArray[np.int64]:
    """Return the indices of the rows of one epoch, as many as there are rows, in the sources' proportions.

    A source that must occur more often than it has rows is repeated whole as often as fits; the rest is
    drawn without replacement. Without weights every row occurs once.
    """
    if weights is None:
        return np.arange(len(source_of), dtype=np.int64)
    rows = [np.flatnonzero(source_of == index) for index in range(len(weights))]
    present = [weight if len(own) else 0.0 for weight, own in zip(weights, rows, strict=True)]
    bounds = np.rint(np.cumsum(present) / sum(present) * len(source_of)).astype(int)
    parts = []
    for index, (own, wanted) in enumerate(zip(rows, np.diff(bounds, prepend=0), strict=True)):
        if len(own):
            passes, rest = divmod(int(wanted), len(own))
            drawn = np.random.default_rng([seed, index]).permutation(own)[:rest]
            parts.append(np.concatenate([np.tile(own, passes), drawn]))
    return np.concatenate(parts).astype(np.int64)


def sources_of(config: DataConfig, kind: Kind) -> list[tuple[SourceConfig, Sequence[float] | None]]:
    """Return the sources that a stage reads, registered names resolved, with the shares that split their rows."""
    listed = config.pretraining if kind == "text" else config.blend
    found: list[tuple[SourceConfig, Sequence[float] | None]] = [
        (part, config.shares if kind != "text" and source.stages is None else None)
        for source in listed
        if source.stages is None or kind in source.stages
        for part in resolve(source)
    ]
    if not found:
        setting = "data.pretraining" if kind == "text" else "data.blend"
        raise DataError(
            f"{setting} names no source for the stage {kind}",
            hint=f"list one, such as {setting}=[rows.jsonl]",
        )
    return found


def _gather(
    source: SourceConfig, split: Sequence[float] | None, kind: Kind, part: Part, config: DataConfig
) -> tuple[list[Any], SourceCounts]:
    """Collect the rows that one stage takes from one source, and count them."""
    tally = Tally()
    by_prompt = config.split_by == "prompt" and kind != "text"
    keys = array("Q")
    found: list[Any] = []
    rows = rows_of_stage = 0
    strict = config.bad_rows == "strict"
    for record in read_source(source, strict=strict, tally=tally, keeps_columns=kind == "ppo"):
        _expect_kind(record, kind)
        key = prompt_key(record) if by_prompt else record.row_id
        keys.append(int(key[:16], 16))
        stage = stage_of(key, split, kinds_of(record)) if split is not None else kind
        if stage != kind or kind not in kinds_of(record):
            continue
        rows_of_stage += 1
        if _part_of(key, source, config) == part:
            rows += 1
            taken = _TAKEN_AS[kind](record)
            if taken is not None:
                found.append(taken)
    counts = SourceCounts(
        source=label_of(source),
        read=tally.read,
        bad=tally.bad,
        most_together=_most_equal(keys) if by_prompt else 0,
        rows_of_stage=rows_of_stage,
        rows=rows,
        unusable=rows - len(found),
        first_bad=tuple(tally.first_bad),
        guessed=tally.guessed,
    )
    return found, counts


def _most_equal(keys: array[int]) -> int:
    """Return how often the most frequent key occurs."""
    return int(np.unique(np.frombuffer(keys, np.uint64), return_counts=True)[1].max()) if keys else 0


def _part_of(key: str, source: SourceConfig, config: DataConfig) -> Part:
    held_out = is_held_out(key, config.held_out_fraction) if source.held_out is None else source.held_out
    return "held_out" if held_out else "train"


def _with_answers(record: Record) -> Demonstration | None:
    """Return the row as a demonstration; None where an answer is empty, even one in a comparison's prompt."""
    taken = as_demonstration(record)
    return None if taken is None or has_empty_answer(taken.messages) else taken


def _with_pairs(record: Record) -> Comparison | None:
    return record if isinstance(record, Comparison) and record.better_than else None


def _as_text(record: Record) -> Text | None:
    return record if isinstance(record, Text) else None


_TAKEN_AS: dict[Kind, Callable[[Record], Any]] = {
    "sft": _with_answers,
    "reward": _with_pairs,
    "ppo": as_prompt,
    "text": _as_text,
}


def _expect_kind(record: Record, kind: Kind) -> None:
    if isinstance(record, Text) and kind != "text":
        raise DataError(
            f"{record.source} holds plain text, which no stage learns from by itself",
            hint="list it under data.pretraining; to learn from conversations, name their columns",
        )
    if kind == "text" and not isinstance(record, Text):
        raise DataError(
            f"{record.source} is listed under data.pretraining, but names no column of plain text",
            hint="set text to that column",
        )


def _capped(
    records: list[Any], owners: NDArray[np.int32], report: DataReport, config: DataConfig
) -> StageRows[Any]:
    """Keep at most `max_eval_rows` rows: those with the smallest hash, so that their order does not matter."""
    ranked = sorted(range(len(records)), key=lambda i: unit_interval(records[i].row_id, "evaluation"))
    kept = sorted(ranked[: config.max_eval_rows])
    source_of = owners[kept] if kept else owners[:0]
    order = np.arange(len(kept), dtype=np.int64)
    return StageRows([records[i] for i in kept], source_of, None, order, config.seed, report)


def _few_held_out(
    counts: Sequence[SourceCounts], asked: Sequence[SourceConfig], fraction: float
) -> list[str]:
    """Return a note if fewer rows are held out than one can judge by, although a source should give some."""
    held_out, total = sum(c.rows for c in counts), sum(c.rows_of_stage for c in counts)
    is_wanted = any(fraction > 0 if source.held_out is None else source.held_out for source in asked)
    if held_out >= FEWEST_HELD_OUT or not is_wanted:
        return []
    proposed = min(LARGEST_FRACTION, math.ceil(200 * FEWEST_HELD_OUT / max(total, 1)) / 100)
    return [
        f"{held_out:,} of {total:,} rows are held out: too few to judge by. Set data.held_out_fraction={proposed:g}, "
        "or list more rows in a source with held_out: true"
    ]


def _weights(sources: Sequence[SourceConfig]) -> tuple[float, ...] | None:
    """Return one weight per source, or None if no source has one.

    A source that is held out whole has no rows in training.
    """
    if all(source.weight is None for source in sources):
        return None
    return tuple(1.0 if source.weight is None else source.weight for source in sources)


def _nothing_to_learn_from(kind: Kind, report: DataReport) -> DataError:
    needs = {
        "sft": "answers to imitate: messages, prompt and response, or comparisons",
        "reward": "comparisons: chosen and rejected, or answers with preference, scores or ranks",
        "ppo": "prompts",
        "text": "a column of plain text",
    }
    seen = "; ".join(counts.line() for counts in report.sources)
    return DataError(
        f"no row is left to train the stage {kind} on: {seen}",
        hint=f"it needs {needs[kind]}, and a share in data.stage_split; stages: [{kind}] gives it all rows of a source",
    )
