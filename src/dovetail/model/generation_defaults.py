"""The generation config that comes with a model: its stop tokens, and values that transformers would not save.

Responsible for: reading which tokens a model says end a text, and repairing decoding values without their mode.
Not responsible for: how Dovetail samples (engine/sampling.py), where the config is written (save.py).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from dovetail.errors import ModelError
from dovetail.model.padding import num_rows
from dovetail.text.quiet import quiet

_MODES = ("do_sample", "num_beams")
"""The values that say how tokens are chosen; most others are meant for one of these modes."""


def declared_stop_ids(model: Any) -> tuple[int, ...]:
    """Return the tokens that the model says end a text: its generation config, or its config where it has none.

    A token without a row in the embedding is left out: the model cannot draw it.
    """
    source = getattr(model, "generation_config", None) or model.config.get_text_config()
    rows = num_rows(model)
    return tuple(i for i in _as_list(source.eos_token_id) if 0 <= i < rows)


def repaired(config: GenerationConfig) -> tuple[GenerationConfig, str | None]:
    """Return a config that transformers agrees to save, and a sentence about what was changed (None if nothing was).

    A value that is used only while sampling says that the model is meant to sample: `do_sample` is set if the file
    leaves it open. Other values without their mode, such as `early_stopping` without beams, have no effect and are
    left out.
    """
    values = {key: value for key, value in config.to_diff_dict().items() if key != "transformers_version"}
    kept, refused = _accepted(values)
    if not refused:
        return config, None
    # A temperature of 0 is how some files say that the model is greedy.
    may_sample = config.do_sample is None and (config.temperature is None or config.temperature > 0)
    if may_sample:
        sampling, still_refused = _accepted({**values, "do_sample": True})
        if still_refused < refused:
            return sampling, _sentence(refused - still_refused, still_refused)
    return kept, _sentence(set(), refused)


def expect_readable(folder: Path) -> None:
    """Raise ModelError if a local folder's generation config cannot be read: transformers would go on without it."""
    file = folder / "generation_config.json"
    if not file.is_file():
        return
    try:
        with quiet():
            GenerationConfig.from_pretrained(folder)
    except (OSError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(
            f"{file} cannot be used: {reason}",
            hint="correct the file, or remove it and set eos_token_id in config.json",
        ) from error


def _accepted(values: Mapping[str, Any]) -> tuple[GenerationConfig, set[str]]:
    """Return a config with every value that transformers would save beside the modes, and the names of the others."""
    kept: GenerationConfig = GenerationConfig()  # type: ignore[no-untyped-call]
    refused: set[str] = set()
    for key in sorted(values, key=lambda name: (name not in _MODES, name)):
        candidate = copy.deepcopy(kept)
        setattr(candidate, key, values[key])
        try:
            candidate.validate(strict=True)
        except ValueError:
            refused.add(key)
        else:
            kept = candidate
    return kept, refused


def _sentence(sampled: Iterable[str], left_out: Iterable[str]) -> str:
    parts = []
    if names := ", ".join(sorted(sampled)):
        parts.append(f"{names} without do_sample: do_sample = true is added")
    if names := ", ".join(sorted(left_out)):
        parts.append(f"{names} without the mode that reads them: they are left out")
    return "; ".join(parts)


def _as_list(ids: int | Iterable[int] | None) -> list[int]:
    if ids is None:
        return []
    return [ids] if isinstance(ids, int) else list(ids)
