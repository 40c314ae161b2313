"""Read prompts to label from any source of the data layer.

Responsible for: reading each prompt once, in an order that a seed decides. Not responsible for: sources (data/).
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import ValidationError

from dovetail.config.data import SourceConfig
from dovetail.config.load import parse_value
from dovetail.data.labels.tasks import prompt_key
from dovetail.data.records import as_prompt
from dovetail.data.registry import resolve
from dovetail.data.sources import read_source
from dovetail.errors import ConfigError, DataError
from dovetail.text.content_hash import content_hash
from dovetail.text.message import Message


def read_prompts(text: str, *, seed: int) -> list[Sequence[Message]]:
    """Read the prompts of a source from the command line: a file, a registered name, or `{path: ...}`.

    Raises ConfigError for a text that is not a source, DataError for rows that cannot be used or hold no prompts.
    """
    found: dict[str, Sequence[Message]] = {}
    for source in resolve(_source(text)):
        for record in read_source(source):
            prompt = as_prompt(record)
            if prompt is not None:
                found.setdefault(prompt_key(prompt.messages), prompt.messages)
    if not found:
        raise DataError(
            f"--prompts {text}: its rows hold no prompts", hint="name columns with prompt or messages"
        )
    return [found[key] for key in sorted(found, key=lambda key: content_hash(seed, key))]


def _source(text: str) -> SourceConfig:
    value = parse_value(text, f"--prompts {text}") if text.startswith("{") else text
    try:
        return SourceConfig.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "source"
        raise ConfigError(
            f"--prompts: {where}: {first['msg']}",
            hint="such as prompts.jsonl, or {path: rows.csv, prompt: question}",
        ) from error
