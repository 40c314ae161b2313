"""Small tables and what they should become, for the tests of the data layer."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dovetail.config.data import DataConfig, SourceConfig

SHARED = Path(__file__).parents[3] / "shared" / "data"
"""Real public data, where there is any beside the project."""


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def questions(count: int, name: str = "q") -> list[dict[str, str]]:
    return [{"prompt": f"{name} {i}?", "response": f"answer {i} to {name}"} for i in range(count)]


def pairs(count: int, name: str = "q") -> list[dict[str, str]]:
    return [{"prompt": f"{name} {i}?", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(count)]


def config(tmp_path: Path, *sources: SourceConfig | str, **changes: Any) -> DataConfig:
    return DataConfig(**{"blend": sources, "cache_dir": str(tmp_path / "cache"), **changes})


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def system(content: str) -> dict[str, str]:
    return {"role": "system", "content": content}
