"""Counts of the rows that were read, bad, used, left out or cut.

Responsible for: the counts of each source for one stage, and lines that show them.
Not responsible for: printing (telemetry/log.py does).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

MAX_SHOWN = 3
"""The number of bad rows that are quoted per source."""


LARGE_SHARE = 0.1
"""The share of a source's rows above which a prompt is named, because all its rows are in one place."""


@dataclass(slots=True)
class Tally:
    """The counts of a source that is being read."""

    read: int = 0
    bad: int = 0
    first_bad: list[str] = field(default_factory=list)
    guessed: str = ""
    """The columns of a source that names none, and what they are taken for."""

    def count_bad(self, reason: str) -> None:
        """Count one more row that cannot be used."""
        self.bad += 1
        if len(self.first_bad) < MAX_SHOWN:
            self.first_bad.append(reason)


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceCounts:
    """The counts of one source's rows in one stage."""

    source: str
    read: int = 0
    """Rows in the table, of all stages."""
    bad: int = 0
    """Rows that could not be read as the source says, and were skipped."""
    most_together: int = 0
    """Rows of the most frequent prompt, which stay together; 0 where the split is not by prompt."""
    rows_of_stage: int = 0
    """Rows for this stage, in training and held out."""
    rows: int = 0
    """Rows for this stage and part."""
    unusable: int = 0
    """The rows among these that lack what the stage needs: comparisons that are all ties, empty best answers."""
    too_long: int = 0
    """The rows among these that are left out for their length."""
    truncated: int = 0
    """The rows among these whose prompt was cut from the left."""
    first_bad: tuple[str, ...] = ()
    """The first bad rows, with place and reason."""
    guessed: str = ""
    """The columns of a source that names none, and what they are taken for."""

    @property
    def used(self) -> int:
        """The number of rows that the stage works with."""
        return self.rows - self.unusable - self.too_long

    def line(self) -> str:
        """Return the counts as one line for people."""
        parts = [f"{self.read:,} rows read"]
        if self.bad:
            parts.append(f"{self.bad:,} bad (skipped)")
        if self.most_together > max(2, LARGE_SHARE * self.read):
            together = f"{self.most_together:,} of them answer one prompt"
            parts.append(f"{together} (they stay together; data.split_by=row divides them)")
        parts.append(f"{self.rows:,} for this stage")
        if self.unusable:
            parts.append(f"{self.unusable:,} without anything to learn (left out)")
        if self.too_long:
            parts.append(f"{self.too_long:,} too long (left out)")
        if self.truncated:
            parts.append(f"{self.truncated:,} with the prompt cut from the left")
        if self.guessed:
            parts.append(f"read as {{{self.guessed}}}")
        return f"{self.source}: {', '.join(parts)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class DataReport:
    """The counts of all rows of one stage, source by source."""

    stage: str
    part: str
    sources: tuple[SourceCounts, ...]
    notes: tuple[str, ...] = ()
    """Advice about the rows of all sources together."""

    @property
    def used(self) -> int:
        """The number of rows of all sources that the stage works with."""
        return sum(counts.used for counts in self.sources)

    def lines(self) -> list[str]:
        """Return lines to print: one per source, the first bad rows below their source, then the notes."""
        out = []
        for counts in self.sources:
            out.append(f"{self.stage}/{self.part}  {counts.line()}")
            out += [f"    skipped: {reason}" for reason in counts.first_bad]
        return out + [f"{self.stage}/{self.part}  {note}" for note in self.notes]

    def with_lengths(self, too_long: Mapping[int, int], truncated: Mapping[int, int]) -> DataReport:
        """Return the report with counts of what tokenising found, by index of the source."""
        counted = [
            replace(counts, too_long=too_long.get(i, 0), truncated=truncated.get(i, 0))
            for i, counts in enumerate(self.sources)
        ]
        return replace(self, sources=tuple(counted))

    def with_refused(self, refused: Mapping[int, Sequence[str]]) -> DataReport:
        """Return the report with rows that turned out to be bad, by index of the source: place and reason of each."""
        counted = [
            replace(
                counts,
                bad=counts.bad + len(refused.get(i, ())),
                rows=counts.rows - len(refused.get(i, ())),
                first_bad=(*counts.first_bad, *refused.get(i, ()))[:MAX_SHOWN],
            )
            for i, counts in enumerate(self.sources)
        ]
        return replace(self, sources=tuple(counted))

    def with_notes(self, notes: Sequence[str]) -> DataReport:
        """Return the report with more advice."""
        return replace(self, notes=(*self.notes, *notes))
