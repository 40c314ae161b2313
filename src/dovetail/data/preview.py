"""Show rows as the model will see them: every token, and which of them it learns from.

Responsible for: what `dovetail data preview` prints, in colour on a terminal, with [[ ]] elsewhere.
Not responsible for: the command (cli/), reading rows (blend.py), or cutting long ones (tokenize.py).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text as Styled

from dovetail.config.data import DataConfig
from dovetail.data.blend import RecordT, StageRows, load_stage
from dovetail.data.openings import faults_at_opening, opening_notes
from dovetail.data.records import Comparison, Demonstration, Kind, Prompt, Record, Text
from dovetail.data.refusals import Refusals, with_refused
from dovetail.data.report import DataReport
from dovetail.data.split import unit_interval
from dovetail.text.chat_format import ChatFormat

LEARNT, CONTEXT, TITLE = "green", "dim", "bold"


@dataclass(frozen=True, slots=True)
class Shown:
    """One token sequence, printable by rich, as stretches of text that are each learnt from or not."""

    title: str
    stretches: tuple[tuple[str, bool], ...]
    columns: tuple[str, ...] = ()
    """The row's columns beside the prompt, each as a line."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if not console.is_terminal:
            yield Styled(str(self))
            return
        text = Styled(f"{self.title}\n", style=TITLE)
        for stretch, is_learnt in self.stretches:
            text.append(stretch, style=f"not bold {LEARNT if is_learnt else CONTEXT}")
        yield text.append("".join(f"\n{line}" for line in (*self.columns, "")), style=CONTEXT)

    def __str__(self) -> str:
        body = "".join(f"[[{text}]]" if is_learnt else text for text, is_learnt in self.stretches)
        return "\n".join((self.title, body, *self.columns, ""))


@dataclass(frozen=True, slots=True)
class Lines:
    """The report of the rows, printable by rich."""

    lines: tuple[str, ...]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Styled(str(self), style=CONTEXT)

    def __str__(self) -> str:
        return "\n".join(self.lines) + "\n"


def preview(config: DataConfig, chat: ChatFormat, stage: Kind, count: int = 3) -> list[Shown | Lines]:
    """Return the report of a stage's rows and `count` of them, always the same, to print with a rich Console.

    What is learnt from is marked: in sft and text the tokens of the loss; in reward the answers that are
    compared, whose last token carries the score; in ppo nothing, since the answers are not sampled yet, but the row's
    other columns, which a reward function gets, are listed.
    """
    rows: Any = load_stage(config, stage, "train")
    chosen, report = _chosen(rows, chat, count, config)
    report = report.with_notes(
        opening_notes(Counter(fault for row in rows.records for fault in faults_at_opening(row, chat)), chat)
    )
    limit = config.max_prompt_tokens if stage == "ppo" else config.max_tokens
    shown: list[Shown | Lines] = [Lines(tuple(report.lines()))]
    for number, record in enumerate(chosen, start=1):
        head = f"{stage} row {number} of {len(chosen)}, {record.source}"
        for name, ids, mask in sequences_of(record, chat):
            counts = f"{len(ids)} tokens, {sum(mask)} marked"
            fate = f", longer than {limit}: {config.too_long}" if len(ids) > limit and stage != "text" else ""
            stretches = tuple(_stretches(ids, mask, chat))
            shown.append(Shown(f"{head}{name}: {counts}{fate}", stretches, tuple(_columns(record))))
    return shown


def _chosen(
    rows: StageRows[RecordT], chat: ChatFormat, count: int, config: DataConfig
) -> tuple[list[RecordT], DataReport]:
    """Return rows that the template takes, always the same, and the report with those that it refused."""
    refusals = Refusals(chat, strict=config.bad_rows == "strict")
    chosen: list[RecordT] = []
    numbers = sorted(
        range(len(rows.records)), key=lambda number: unit_interval(rows.records[number].row_id, "preview")
    )
    while numbers and len(chosen) < count:
        tried, numbers = numbers[: count - len(chosen)], numbers[count - len(chosen) :]
        records = [rows.records[number] for number in tried]
        chosen += [records[place] for place in refusals.accepted(records, tried)]
    refusals.finish()
    return chosen, with_refused(rows, refusals.found)


def sequences_of(record: Record, chat: ChatFormat) -> Iterator[tuple[str, list[int], list[bool]]]:
    """Yield the token sequences of a row: a name for each, its tokens, and a mask of those to mark."""
    if isinstance(record, Demonstration):
        ids, mask = chat.conversation(record.messages)
        yield "", ids, mask
    elif isinstance(record, Prompt):
        ids = chat.prompt_ids(record.messages)
        yield "", ids, [False] * len(ids)
    elif isinstance(record, Comparison):
        prompt = chat.prompt_ids(record.messages)
        for index, text in enumerate(record.answers):
            worse = [str(b + 1) for a, b, _ in record.better_than if a == index]
            name = f", answer {index + 1} of {len(record.answers)}"
            answer = chat.answer_ids(text)
            mask = [False] * len(prompt) + [True] * len(answer)
            yield f"{name}, better than {', '.join(worse)}" if worse else name, prompt + answer, mask
    elif isinstance(record, Text):
        (ids,) = chat.encode_texts([record.text])
        yield "", ids, [True] * len(ids)


def _columns(record: Record) -> Iterator[str]:
    """Yield the columns that a reward function gets beside the prompt, as JSON."""
    for name, value in record.row.items():
        yield f"  {name} = {json.dumps(value, ensure_ascii=False)}"


def _stretches(ids: Sequence[int], mask: Sequence[bool], chat: ChatFormat) -> Iterator[tuple[str, bool]]:
    for is_learnt, group in groupby(zip(ids, mask, strict=True), key=lambda pair: pair[1]):
        run = [token for token, _ in group]
        yield str(chat.tokenizer.decode(run, clean_up_tokenization_spaces=False)), is_learnt
