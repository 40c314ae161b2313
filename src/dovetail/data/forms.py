"""Turn rows of a table into records, by the columns that a source names.

Responsible for: the six forms of rows, which answers make a pair and which are ties.
Not responsible for: reading tables (tables.py), finding values (columns.py), columns that are not named (guesses.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from dovetail.config.data import SourceConfig
from dovetail.data.columns import (
    BadRowError,
    as_text,
    describe,
    filled,
    is_absent,
    is_template,
    list_of,
    number_of,
    parsed,
    text_of,
    value_of,
)
from dovetail.data.conversations import (
    DEFAULT_NAMES,
    answer_from_transcript,
    begins_with_a_name,
    has_empty_answer,
    merged,
    messages_from,
    messages_in,
    transcript_from,
)
from dovetail.data.records import (
    Comparison,
    Demonstration,
    Message,
    Prompt,
    Record,
    Text,
    content_hash,
    is_learnt,
    message,
)

Row = Mapping[str, Any]

_VERDICTS = ("label", "kto_tag")
"""Columns in which rows of prompt and answer say that people did not want the answer (KTO)."""
_TOOLS = ("tools", "functions")
"""Columns beside a conversation that the assistant would see."""


def record_of(row: Row, source: SourceConfig, label: str) -> Record:
    """Return the record that a row holds; BadRowError if it holds none."""
    if source.text is not None:
        text = text_of(row, source.text)
        if not text.strip():
            raise BadRowError(f"{source.text} is empty")
        return Text(text=text, row_id=content_hash("text", text), source=label)
    _expect_no_tools(row)
    source = _with_transcript_decided(row, source)
    is_prompt = source.response is None and source.messages is None
    if _was_skipped(row) and source.prompt is not None:
        is_prompt = True
    elif source.chosen is not None or source.answers is not None:
        return _comparison(row, source, label)
    if is_prompt:
        messages = _prompt(row, source)
        return Prompt(messages=messages, row_id=content_hash("prompt", messages), source=label)
    _expect_wanted(row)
    messages = _demonstration(row, source)
    return Demonstration(messages=messages, row_id=content_hash("demonstration", messages), source=label)


def _with_transcript_decided(row: Row, source: SourceConfig) -> SourceConfig:
    """Return the source with `transcript` set: as it says, or by what the row's texts begin with."""
    if source.transcript is not None:
        return source
    is_transcript = source.transcript_names != DEFAULT_NAMES
    for column in (source.prompt, source.messages, source.chosen):
        if isinstance(column, str) and not is_transcript and not is_template(column):
            value = value_of(row, f"{column.removesuffix('?')}?")
            is_transcript = isinstance(value, str) and begins_with_a_name(value)
    return source.model_copy(update={"transcript": is_transcript})


def _expect_no_tools(row: Row) -> None:
    for column in _TOOLS:
        if not is_absent(row.get(column)) and row[column] not in ([], {}, "", "[]"):
            raise BadRowError(
                f"the row has {column}, which the model would not see",
                hint=f"remove {column} from rows whose answers do not need it; calls of tools cannot be learnt",
            )


def _expect_wanted(row: Row) -> None:
    for column in _VERDICTS:
        if row.get(column) is False or row.get(column) in ("False", "false"):
            raise BadRowError(
                f"{column} is false: people did not want this answer, and a demonstration is imitated",
                hint="remove such rows, or pair them with wanted answers as chosen and rejected; rename the column "
                "if it means something else",
            )


def _was_skipped(row: Row) -> bool:
    """Return whether all annotators skipped this task of Label Studio, which leaves a prompt without a verdict."""
    work = row.get("annotations")
    marks = (
        [isinstance(one, Mapping) and one.get("was_cancelled") for one in work]
        if isinstance(work, list)
        else []
    )
    return bool(marks) and all(marks)


def _demonstration(row: Row, source: SourceConfig) -> tuple[Message, ...]:
    turns = _shown(row, source)
    column = str(source.response or source.messages)
    while turns and (turns[-1]["role"] != "assistant" or not is_learnt(turns[-1])):
        turns.pop()  # questions without an answer, and answers that are not to be learnt
    if not turns:
        raise BadRowError(f"{column} has no assistant's turn that is to be learnt")
    if not turns[-1]["content"].strip():
        raise BadRowError(f"{column}: the answer is empty")
    if has_empty_answer(turns):
        raise BadRowError(f"{source.messages or _named(source.prompt)}: an answer before the last is empty")
    _expect_a_question(turns[:-1], _named(source.prompt or source.messages))
    return tuple(turns)


def _shown(row: Row, source: SourceConfig) -> list[Message]:
    """Return the whole conversation of a demonstration."""
    if source.messages is None:
        side = _side(value_of(row, str(source.response)), str(source.response), source)
        side[-1]["content"] = _cleaned(side[-1]["content"], source)
        return merged([*_prompt(row, source), *side]) if _is_answer(side) else side
    value = value_of(row, source.messages)
    turns = (
        _conversation(value, source.messages, source)
        if source.transcript
        else messages_from(value, source.messages)
    )
    return _with_system(turns, row, source)


def _prompt(row: Row, source: SourceConfig) -> tuple[Message, ...]:
    turns = _with_system(_asked(row, source), row, source)
    _expect_a_question(turns, _named(source.prompt))
    return tuple(turns)


def prompt_turns(row: Row, source: SourceConfig) -> list[Message]:
    """Return the turns of the prompt's column; the last one may be of any role."""
    return _asked(row, _with_transcript_decided(row, source))


def _asked(row: Row, source: SourceConfig) -> list[Message]:
    """Return the turns of the prompt's column; several columns are joined to one text, a blank line between."""
    assert source.prompt is not None
    if isinstance(source.prompt, str) and is_template(source.prompt):
        return [message("user", filled(source.prompt, row))]
    if isinstance(source.prompt, str):
        return _conversation(value_of(row, source.prompt), source.prompt, source)
    values = {column: value_of(row, column) for column in source.prompt}
    texts = [as_text(value, column) for column, value in values.items() if value is not None]
    return _conversation("\n\n".join(text for text in texts if text.strip()), _named(source.prompt), source)


def _comparison(row: Row, source: SourceConfig, label: str) -> Comparison:
    messages, answers, pairs = (_pair if source.chosen is not None else _ranked_answers)(row, source)
    margin = value_of(row, source.margin) if source.margin is not None else None
    size = 0.0 if margin is None else number_of(margin, str(source.margin))
    better_than = tuple(
        (better, worse, size) for better, worse in pairs if answers[better] != answers[worse]
    )  # equal texts: a tie
    row_id = content_hash("comparison", messages, answers, better_than)
    return Comparison(
        messages=tuple(messages), answers=tuple(answers), better_than=better_than, row_id=row_id, source=label
    )


Judged = tuple[Sequence[Message], list[str], list[tuple[int, int]]]
"""A prompt, its answers, and (better, worse) for pairs of them."""


def _pair(row: Row, source: SourceConfig) -> Judged:
    """Return prompt and answers of a row with `chosen` and `rejected`, either answers or whole conversations."""
    columns = [str(source.chosen), str(source.rejected)]
    values = [value_of(row, column) for column in columns]
    if values[1] is None:  # an optional column: nothing to compare with
        values, columns = values[:1], columns[:1]
    sides = [_side(value, column, source) for value, column in zip(values, columns, strict=True)]
    before = _before_the_answers(row, sides, source)
    whole = [_closed(merged([*before, *side]) if _is_answer(side) else side) for side in sides]
    if whole[0][:-1] != whole[-1][:-1]:
        shared = zip(*whole, strict=False)
        turn = next((i for i, (a, b) in enumerate(shared) if a != b), min(map(len, whole)))
        raise BadRowError(
            f"{' and '.join(columns)} are different conversations: they part at turn {turn + 1}, before the last",
            hint="both must have the same turns before the last answer",
        )
    prompt = _with_system(whole[0][:-1], row, source)
    if not prompt:
        raise BadRowError(
            f"{columns[0]} is one text without turns, and the source names no prompt",
            hint="name the prompt's column, or set transcript: true if the text has named turns",
        )
    _expect_a_question(prompt, columns[0])
    if not is_learnt(whole[0][-1]):
        raise BadRowError(f"{columns[0]} ends with a turn that is marked as not to be learnt")
    answers = [_cleaned(turns[-1]["content"], source) for turns in whole]
    return prompt, answers, [(0, 1)] if len(answers) == 2 else []


def _before_the_answers(row: Row, sides: Sequence[list[Message]], source: SourceConfig) -> Sequence[Message]:
    """Return the turns before an answer that is given alone: those of the prompt's column or of the other side."""
    if not any(map(_is_answer, sides)):
        return ()
    if source.prompt is not None:
        return _asked(row, source)
    return next((side[:-1] for side in sides if not _is_answer(side)), ())


def _side(value: Any, column: str, source: SourceConfig) -> list[Message]:
    """Return the turns of one of several answers: a whole conversation, or the turns that follow the prompt."""
    turns = messages_in(value, column)
    if turns is not None:
        return turns
    text = as_text(value, column)
    is_whole = source.prompt is None or begins_with_a_name(text, source.transcript_names[:1])
    if source.transcript and is_whole:
        return transcript_from(text, column, source.transcript_names)
    if source.transcript:
        text = answer_from_transcript(text, source.transcript_names)
    return [message("assistant", text)]


def _is_answer(side: Sequence[Message]) -> bool:
    return side[0]["role"] == "assistant"


def _closed(turns: list[Message]) -> list[Message]:
    """Return a conversation that ends with an answer, which may be empty."""
    return turns if turns[-1]["role"] == "assistant" else [*turns, message("assistant", "")]


def _ranked_answers(row: Row, source: SourceConfig) -> Judged:
    assert source.answers is not None
    columns = source.answers
    values = list_of(row, columns)
    names = [f"{columns}[{i}]" for i in range(len(values))] if isinstance(columns, str) else list(columns)
    present = [i for i, value in enumerate(values) if not is_absent(value)]  # optional columns may be absent
    prompt = _prompt(row, source)
    answers = [_answer(values[i], names[i], prompt, source) for i in present]
    if len(answers) < 2:
        raise BadRowError(f"{columns} holds {len(answers)} answers; a comparison needs two or more")
    if source.preference is not None:
        if len(present) != 2:
            raise BadRowError(f"{columns} holds {len(answers)} answers; {source.preference} compares two")
        return prompt, answers, _preferred(value_of(row, source.preference), source)
    return prompt, answers, _by_worth(row, source, present, len(values))


def _answer(value: Any, column: str, prompt: Sequence[Message], source: SourceConfig) -> str:
    side = _side(value, column, source)
    if side[-1]["role"] != "assistant":
        raise BadRowError(f"{column} should end with the assistant's turn")
    if len(side) > 1 and tuple(side[:-1]) != tuple(turn for turn in prompt if turn["role"] != "system"):
        raise BadRowError(f"{column} is a conversation that does not begin as {_named(source.prompt)}")
    return _cleaned(side[-1]["content"], source)


def _by_worth(
    row: Row, source: SourceConfig, present: Sequence[int], num_answers: int
) -> list[tuple[int, int]]:
    """Return (better, worse) for all pairs of answers whose scores or ranks differ."""
    columns = source.scores if source.scores is not None else source.ranks
    assert columns is not None
    values = list_of(row, columns)
    if len(values) != num_answers:
        raise BadRowError(f"{columns} holds {len(values)} numbers for {num_answers} answers")
    sign = 1 if source.scores is not None else -1
    worth = [sign * number_of(values[i], str(columns)) for i in present]
    indices = range(len(worth))
    return [(i, j) for i in indices for j in indices if worth[i] > worth[j]]


def _preferred(value: Any, source: SourceConfig) -> list[tuple[int, int]]:
    if value is None:  # an optional column: no verdict
        return []
    first, second = source.preference_values
    outcomes: list[tuple[Any, list[tuple[int, int]]]] = [(first, [(0, 1)]), (second, [(1, 0)])]
    for meant, pairs in [*outcomes, *((tie, []) for tie in source.tie_values)]:
        if value == meant or str(value) == str(meant):
            return pairs
    column = str(source.preference)
    problem = f"{column} should be {first!r} or {second!r}, but is {describe(value)}"
    try:
        place, low, high = number_of(value, column), float(first), float(second)
    except (BadRowError, TypeError, ValueError):
        raise BadRowError(
            problem, hint="set preference_values and tie_values to what the column holds"
        ) from None
    if not min(low, high) <= place <= max(low, high):
        raise BadRowError(f"{problem}, outside of their range", hint="add it to tie_values if it means a tie")
    to_first, to_second = abs(place - low), abs(place - high)
    if to_first == to_second:
        return []
    return [(0, 1)] if to_first < to_second else [(1, 0)]


def _cleaned(text: str, source: SourceConfig) -> str:
    return re.sub(source.remove, "", text) if source.remove is not None else text


def _conversation(value: Any, column: str, source: SourceConfig) -> list[Message]:
    """Return the turns of a list of messages, a transcript, or plain text, which is one user's turn."""
    turns = messages_in(value, column)
    if turns is not None:
        return turns
    if source.transcript:
        return transcript_from(as_text(value, column), column, source.transcript_names)
    return [message("user", as_text(value, column))]


def _earlier_turns(row: Row, source: SourceConfig) -> list[Message]:
    """Return the turns of the history: messages, or pairs of question and answer."""
    if source.history is None:
        return []
    value = parsed(value_of(row, f"{source.history.removesuffix('?')}?"))
    if not value:
        return []
    if isinstance(value, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in value):
        texts = [as_text(text, f"{source.history}[{i}]") for i, pair in enumerate(value) for text in pair]
        return [message("user" if i % 2 == 0 else "assistant", text) for i, text in enumerate(texts)]
    return messages_from(value, source.history)


def _with_system(turns: list[Message], row: Row, source: SourceConfig) -> list[Message]:
    turns = [*_earlier_turns(row, source), *turns]
    system = value_of(row, f"{source.system.removesuffix('?')}?") if source.system is not None else None
    if system is None or not str(system).strip():
        return turns
    return merged([message("system", as_text(system, str(source.system))), *turns])


def _named(columns: str | tuple[str, ...] | None) -> str:
    return columns if isinstance(columns, str) else " and ".join(columns or ())


def _expect_a_question(turns: Sequence[Message], column: str) -> None:
    if not turns or turns[-1]["role"] != "user":
        raise BadRowError(f"{column} does not end with a user's turn before the answer")
    if not turns[-1]["content"].strip():
        raise BadRowError(f"{column}: the last user's turn is empty")
