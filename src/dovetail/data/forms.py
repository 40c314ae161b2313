"""Rows of a table to records, by the columns that a source names.

Responsible for: the six forms of rows, which answers make a pair and which are ties.
Not responsible for: reading tables (tables.py), finding values (columns.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from dovetail.config.data import SourceConfig
from dovetail.data.columns import (
    BadRowError,
    as_text,
    describe,
    list_of,
    number_of,
    parsed,
    text_of,
    value_of,
)
from dovetail.data.conversations import (
    answer_from_transcript,
    begins_with_a_name,
    has_empty_answer,
    merged,
    messages_from,
    transcript_from,
)
from dovetail.data.records import Comparison, Demonstration, Message, Prompt, Record, Text, content_hash

Row = Mapping[str, Any]


def record_of(row: Row, source: SourceConfig, label: str) -> Record:
    """The record that a row holds; BadRowError if it holds none."""
    if source.text is not None:
        text = text_of(row, source.text)
        if not text.strip():
            raise BadRowError(f"{source.text} is empty")
        return Text(text=text, row_id=content_hash("text", text), source=label)
    if source.chosen is not None or source.answers is not None:
        return _comparison(row, source, label)
    if source.messages is not None or source.response is not None:
        messages = _demonstration(row, source)
        return Demonstration(messages=messages, row_id=content_hash("demonstration", messages), source=label)
    messages = _prompt(row, source)
    return Prompt(messages=messages, row_id=content_hash("prompt", messages), source=label)


def with_guessed_columns(source: SourceConfig, row: Row) -> SourceConfig:
    """A source that names no columns, with those that its first row seems to have."""
    if source.names_columns():
        return source
    guesses: list[dict[str, str]] = [
        {"chosen": "chosen", "rejected": "rejected", "prompt": "prompt"},
        {"chosen": "chosen", "rejected": "rejected"},
        {"messages": "messages"},
        {"messages": "conversations"},
        *({"prompt": "prompt", "response": name} for name in ("response", "completion", "answer")),
        {"prompt": "prompt"},
        {"text": "text"},
    ]
    for guess in guesses:
        if all(column in row for column in guess.values()):
            transcript = any(
                isinstance(row[c], str) and begins_with_a_name(row[c]) for c in guess.values() if c != "text"
            )
            return source.model_copy(update={**guess, "transcript": source.transcript or transcript})
    raise BadRowError(
        f"the source names no columns, and those of the row are not common ones: {', '.join(row)}",
        hint="say what they hold, such as prompt: question, response: answer, or chosen: good, rejected: bad",
    )


def _demonstration(row: Row, source: SourceConfig) -> tuple[Message, ...]:
    if source.messages is not None:
        value = value_of(row, source.messages)
        read = (
            _conversation(value, source.messages, source)
            if source.transcript
            else messages_from(value, source.messages)
        )
        turns = _with_system(read, row, source)
        while turns and turns[-1]["role"] != "assistant":
            turns.pop()  # questions that nobody answered
        if not turns:
            raise BadRowError(f"{source.messages} has no assistant's turn")
    else:
        assert source.response is not None
        answer = _answer(value_of(row, source.response), source.response, source)
        turns = [*_prompt(row, source), {"role": "assistant", "content": answer}]
    if not turns[-1]["content"].strip():
        raise BadRowError(f"{source.response or source.messages}: the answer is empty")
    if has_empty_answer(turns):
        raise BadRowError(f"{source.messages or source.prompt}: an answer before the last is empty")
    _expect_a_question(turns[:-1], source.prompt or source.messages or "the prompt")
    return tuple(turns)


def _prompt(row: Row, source: SourceConfig) -> tuple[Message, ...]:
    assert source.prompt is not None
    value = value_of(row, source.prompt)
    turns = _with_system(_conversation(value, source.prompt, source), row, source)
    _expect_a_question(turns, source.prompt)
    return tuple(turns)


def _comparison(row: Row, source: SourceConfig, label: str) -> Comparison:
    messages, answers = _pair(row, source) if source.chosen is not None else _ranked_answers(row, source)
    margin = number_of(value_of(row, source.margin), source.margin) if source.margin is not None else 0.0
    if source.chosen is not None:
        pairs = [(0, 1, margin)] if len(answers) == 2 else []
    else:
        pairs = [(better, worse, margin) for better, worse in _preferences(row, source, len(answers))]
    better_than = tuple(pair for pair in pairs if answers[pair[0]] != answers[pair[1]])  # equal texts: a tie
    row_id = content_hash("comparison", messages, answers, better_than)
    return Comparison(
        messages=tuple(messages), answers=tuple(answers), better_than=better_than, row_id=row_id, source=label
    )


def _pair(row: Row, source: SourceConfig) -> tuple[list[Message], list[str]]:
    """Prompt and answers of a row with `chosen` and `rejected`, either answers or whole conversations."""
    assert source.chosen is not None
    assert source.rejected is not None
    columns: tuple[str, ...] = (source.chosen, source.rejected)
    values = [value_of(row, column) for column in columns]
    if values[1] is None:  # an optional column: nothing to compare with
        values, columns = values[:1], columns[:1]
    if source.prompt is not None and _messages_in(values[0]) is None:
        prompt = list(_prompt(row, source))
        return prompt, [_answer(value, column, source) for value, column in zip(values, columns, strict=True)]
    whole = [_whole(value, column, source) for value, column in zip(values, columns, strict=True)]
    if whole[0][:-1] != whole[-1][:-1]:
        shared = zip(*whole, strict=False)
        turn = next((i for i, (a, b) in enumerate(shared) if a != b), min(map(len, whole)))
        raise BadRowError(
            f"{' and '.join(columns)} are different conversations: they part at turn {turn + 1}, before the last",
            hint="both must have the same turns before the last answer",
        )
    prompt = _with_system(whole[0][:-1], row, source)
    _expect_a_question(prompt, columns[0])
    return prompt, [_cleaned(turns[-1]["content"], source) for turns in whole]


def _whole(value: Any, column: str, source: SourceConfig) -> list[Message]:
    """A conversation that ends with the answer to be judged, which may be empty."""
    turns = _conversation(value, column, source)
    if len(turns) < 2 and turns[-1]["role"] != "assistant" and not _is_transcript(value, source):
        raise BadRowError(
            f"{column} is one text without turns, and the source names no prompt",
            hint="name the prompt's column, or set transcript: true if the text has named turns",
        )
    return turns if turns[-1]["role"] == "assistant" else [*turns, {"role": "assistant", "content": ""}]


def _ranked_answers(row: Row, source: SourceConfig) -> tuple[list[Message], list[str]]:
    assert source.answers is not None
    columns = source.answers
    names = [f"{columns}[{i}]" for i in range(10**4)] if isinstance(columns, str) else list(columns)
    values = list_of(row, columns)
    answers = [_answer(value, name, source) for value, name in zip(values, names, strict=False)]
    if len(answers) < 2:
        raise BadRowError(f"{columns} holds {len(answers)} answers; a comparison needs two or more")
    return list(_prompt(row, source)), answers


def _preferences(row: Row, source: SourceConfig, num_answers: int) -> list[tuple[int, int]]:
    """(better, worse) for all pairs that are no ties."""
    if source.preference is not None:
        return _preferred(value_of(row, source.preference), source)
    columns = source.scores if source.scores is not None else source.ranks
    assert columns is not None
    values = list_of(row, columns)
    if len(values) != num_answers:
        raise BadRowError(f"{columns} holds {len(values)} numbers for {num_answers} answers")
    sign = 1 if source.scores is not None else -1
    worth = [sign * number_of(value, str(columns)) for value in values]
    indices = range(num_answers)
    return [(i, j) for i in indices for j in indices if worth[i] > worth[j]]


def _preferred(value: Any, source: SourceConfig) -> list[tuple[int, int]]:
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


def _answer(value: Any, column: str, source: SourceConfig) -> str:
    if isinstance(value, list):  # messages: the last one is the answer
        turns = messages_from(value, column)
        if turns[-1]["role"] != "assistant":
            raise BadRowError(f"{column} should end with the assistant's turn")
        return _cleaned(turns[-1]["content"], source)
    text = as_text(value, column)
    if source.transcript:
        text = answer_from_transcript(text, source.transcript_names)
    return _cleaned(text, source)


def _cleaned(text: str, source: SourceConfig) -> str:
    return re.sub(source.remove, "", text) if source.remove is not None else text


def _conversation(value: Any, column: str, source: SourceConfig) -> list[Message]:
    """Messages from a list, a transcript, or plain text, which is one user's turn."""
    listed = _messages_in(value)
    if listed is not None:
        return messages_from(listed, column)
    text = as_text(value, column)
    if source.transcript:
        return transcript_from(text, column, source.transcript_names)
    return [{"role": "user", "content": text}]


def _messages_in(value: Any) -> list[Any] | None:
    """The list of messages that a value is, or holds as JSON; None for text, such as "[2, 3, 5]"."""
    items = parsed(value)
    if not isinstance(items, list):
        return None
    if not isinstance(value, str):
        return items
    are_messages = all(isinstance(item, Mapping) and ("role" in item or "from" in item) for item in items)
    return items if items and are_messages else None


def _is_transcript(value: Any, source: SourceConfig) -> bool:
    return source.transcript and isinstance(value, str)


def _with_system(turns: list[Message], row: Row, source: SourceConfig) -> list[Message]:
    system = value_of(row, f"{source.system.removesuffix('?')}?") if source.system is not None else None
    if system is None or not str(system).strip():
        return turns
    return merged([{"role": "system", "content": as_text(system, str(source.system))}, *turns])


def _expect_a_question(turns: list[Message] | tuple[Message, ...], column: str) -> None:
    if not turns or turns[-1]["role"] != "user":
        raise BadRowError(f"{column} does not end with a user's turn before the answer")
    if not turns[-1]["content"].strip():
        raise BadRowError(f"{column}: the last user's turn is empty")
