"""Rows that only the chat template refuses, such as a conversation that the assistant begins, count as bad rows.

Responsible for: finding them, and stopping at them or counting them as `data.bad_rows` says.
Not responsible for: rows that no template could take (sources.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from dovetail.data.blend import RecordT, StageRows
from dovetail.data.records import Record, as_prompt
from dovetail.data.report import DataReport
from dovetail.errors import DataError
from dovetail.text.chat_format import ChatFormat
from dovetail.text.template import RefusedByTemplateError


@dataclass(slots=True)
class Refusals:
    """The rows of a stage that the template has refused so far."""

    chat: ChatFormat
    strict: bool
    found: list[tuple[int, str]] = field(default_factory=list)
    """The number of each refused row in the stage, and the reason."""
    num_accepted: int = 0
    _first: DataError | None = None

    def accepted(self, records: Sequence[Record], numbers: Sequence[int]) -> list[int]:
        """Return the indices of the records that the template takes; `numbers` are their numbers in the stage.

        strict: raise a DataError with the row's place, as soon as another row is known to be good.
        """
        kept = []
        for place, record in enumerate(records):
            error = self._refusal(record)
            if error is None:
                kept.append(place)
                continue
            self._first = self._first or DataError(f"{record.place}: {error.message}", hint=error.hint)
            self.found.append((numbers[place], error.message))
        self.num_accepted += len(kept)
        if self.strict and self._first is not None and self.num_accepted:
            skip = "set data.bad_rows=skip to leave such rows out"
            raise DataError(self._first.message, hint=f"{self._first.hint}; or {skip}")
        return kept

    def finish(self) -> None:
        """Raise the first refusal if it had to wait for a good row, and none came."""
        if self.strict and self._first is not None:
            raise self._first

    def _refusal(self, record: Record) -> RefusedByTemplateError | None:
        prompt = as_prompt(record)
        try:
            if prompt is not None:
                self.chat.prompt_ids(prompt.messages)
        except RefusedByTemplateError as error:
            return error
        return None


def with_refused(rows: StageRows[RecordT], refused: Sequence[tuple[int, str]]) -> DataReport:
    """Return the report of the rows with those that the template refused: (number of the row, reason)."""
    found: dict[int, list[str]] = {}
    for number, reason in refused:
        found.setdefault(int(rows.source_of[number]), []).append(f"{rows.records[number].place}: {reason}")
    return rows.report.with_refused(found)
