"""The tokens that end answers, as the model declares them.

Responsible for: reading them beside the tokenizer, as transformers' `generate` would, and keeping them on it.
Not responsible for: what the tokenizer and the chat template say ends an answer (chat_format.py).

Some models end a turn with a token that neither names: GLM-4 with `<|user|>`, in generation_config.json alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.hub import cached_file

_ATTRIBUTE = "dovetail_model_ends"
_FILES = ("generation_config.json", "config.json")
"""The files that may declare them; the first one that exists decides, as in transformers."""


def note_model_ends(tokenizer: PreTrainedTokenizerBase, name: str, revision: str | None) -> None:
    """Keep on `tokenizer` the end tokens that the model of the same folder or hub name declares."""
    declared = next((found for file in _FILES if (found := _read(name, file, revision)) is not None), {})
    ends = declared.get("eos_token_id")
    listed = ends if isinstance(ends, list) else [ends]
    # A token that the tokenizer lacks can never be drawn.
    kept = tuple(i for i in listed if isinstance(i, int) and 0 <= i < len(tokenizer))
    setattr(tokenizer, _ATTRIBUTE, kept)


def model_ends(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the tokens that `note_model_ends` kept; none for tokenizers made otherwise."""
    return tuple(getattr(tokenizer, _ATTRIBUTE, ()))


def _read(name: str, file: str, revision: str | None) -> dict[str, Any] | None:
    try:
        place = cached_file(
            name,
            file,
            revision=revision,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        found = None if place is None else json.loads(Path(place).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # loading the model reports it
        return None
    return found if isinstance(found, dict) else None
