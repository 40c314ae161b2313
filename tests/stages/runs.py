"""Whole runs at tiny scale: models, rows and a configuration, all in one folder."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from dovetail.config.run import RunConfig
from dovetail.model.save import save_model
from tests.fakes import byte_tokenizer, tiny_model

_WORDS = ["red", "a dog", "seven", "over there", "no", "tea", "the sea", "why not", "once", "it is"]
_RATE = {"learning_rate": 1e-3, "schedule": "constant", "eps": 1e-3}
"""Adam divides a gradient by its size, so that with a small eps one of nearly nothing makes a whole step of its
rounding, which differs from one kind of CPU to another and with the order of additions."""
_STAGE = {"batch_size": 4, "max_steps": 3, "save_every": 1, "eval_every": 2}


def save_tiny_model(
    folder: Path, name: str = "llama", *, tokenizer: PreTrainedTokenizerBase | None = None, seed: int = 0
) -> Path:
    """A model folder such as a user would give."""
    save_model(tiny_model(name, seed=seed), tokenizer or byte_tokenizer(), folder)
    return folder


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """A jsonl file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_data(folder: Path) -> dict[str, Any]:
    """`data` of a RunConfig: demonstrations, comparisons, prompts and texts, each with some held out."""
    rows = {
        "sft": lambda i, word: {"prompt": f"Say {word} {i}", "response": f"{word}!"},
        "reward": lambda i, word: {"prompt": f"Say {word} {i}", "chosen": f"{word}!", "rejected": f"um {i}"},
        "ppo": lambda i, word: {"prompt": f"Say {word} {i}"},
    }
    blend = []
    for stage, row_of in rows.items():
        for part, numbers in (("train", range(10)), ("held_out", range(10, 14))):
            made = [row_of(i, _WORDS[i % len(_WORDS)]) for i in numbers]
            file = write_rows(folder / f"{stage}-{part}.jsonl", made)
            blend.append({"path": str(file), "stages": [stage], "held_out": part == "held_out"})
    texts = write_rows(folder / "texts.jsonl", [{"text": f"Plain text: {word}."} for word in _WORDS])
    return {
        "blend": blend,
        "pretraining": [{"path": str(texts), "text": "text", "held_out": False}],
        "cache_dir": str(folder / "cache"),
    }


def tiny_run(folder: Path, name: str = "llama", **changes: Any) -> RunConfig:
    """A run in `folder/run` of three steps a stage; `changes` go into the configuration, group by group."""
    model = folder / f"model-{name}"
    if not model.exists():
        save_tiny_model(model, name)
    settings: dict[str, Any] = {
        "actor": {"path": str(model)},
        "reward_model": {"path": str(model)},
        "data": write_data(folder / "data"),
        "sft": {**_STAGE, "epochs": 2.0, "optimizer": _RATE},
        "reward": {**_STAGE, "epochs": 2.0, "optimizer": _RATE},
        "ppo": {
            **_STAGE,
            "sampling": {"max_new_tokens": 8},
            "critic_warmup_rollouts": 0,
            "actor_optimizer": _RATE,
            "critic_optimizer": _RATE,
            "print_samples_every": 1,
        },
        "output_dir": str(folder / "run"),
        "device": "cpu",
        "precision": "fp32",
        "tracking": {"tensorboard": False},
    }
    return RunConfig.model_validate(_merged(settings, changes))


def _merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    both = {**old, **new}
    for key, value in new.items():
        if isinstance(value, dict) and isinstance(old.get(key), dict):
            both[key] = _merged(old[key], value)
    return both
