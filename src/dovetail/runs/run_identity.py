"""Tie a run folder to its configuration.

Responsible for: the file `config.yaml`, its fingerprint, and naming the settings in which two configurations
differ. Not responsible for: the folder (run_folder.py), what the settings mean (config/).

The settings of MAY_CHANGE may differ between two starts of one run, because the result does not depend on
them (but for rounding, in the case of `micro_batch_tokens`).
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from dovetail.errors import CheckpointError
from dovetail.runs.disk import write_atomically

MAY_CHANGE = (
    "output_dir",
    "device",
    "num_gpus",
    "stages",
    "tracking.*",
    "zero_stage.*",
    "tensor_parallel.*",
    "offload.*",
    "data.cache_dir",
    "*.micro_batch_tokens",
    "*.activation_checkpointing",
    "*.offload_while_generating",
    "*.save_every",
    "*.keep_checkpoints",
    "*.print_samples_every",
    "*.eval_tasks",
)
"""Patterns of dotted keys."""

SHOWN = 8
"""Differences listed in an error; more are counted."""

_FINGERPRINT = "# fingerprint: "
_BEGUN = re.compile(r"^# begun: (\S+)$", re.MULTILINE)


def write_identity(path: Path, config: Mapping[str, Any]) -> None:
    """Write the resolved configuration with the fingerprint of what decides the result, and when the run began."""
    body = yaml.safe_dump(_plain(config), sort_keys=False, allow_unicode=True, width=110)
    begun = (begun_at(path) or datetime.now()).isoformat(timespec="seconds")
    head = "# The resolved configuration of this run. Written by dovetail; edits are noticed.\n"
    write_atomically(path, f"{head}# begun: {begun}\n{_FINGERPRINT}{fingerprint(config)}\n{body}")


def begun_at(path: Path) -> datetime | None:
    """Return when the run of this file began; None if there is no such file, or it does not say."""
    try:
        found = _BEGUN.search(path.read_text(encoding="utf-8"))
        return datetime.fromisoformat(found[1]) if found else None
    except (OSError, ValueError):
        return None


def is_identity(path: Path) -> bool:
    """Return whether `write_identity` wrote this file, be it edited or not."""
    try:
        return _FINGERPRINT in path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False


def expect_same_identity(path: Path, config: Mapping[str, Any]) -> None:
    """Raise CheckpointError, listing the settings, unless `path` was written for the same configuration."""
    try:
        text = path.read_text(encoding="utf-8")
        saved = yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise CheckpointError(
            f"{path} cannot be read: {error}", hint="give another output_dir, or restore the file"
        ) from error
    if not isinstance(saved, dict) or f"{_FINGERPRINT}{fingerprint(saved)}\n" not in text:
        raise CheckpointError(
            f"{path} was edited after the run began: its fingerprint does not match its contents",
            hint="undo the edit to go on with the run, or give another output_dir for the new settings",
        )
    found = differences(saved, config)
    if found:
        listed = "".join(f"\n  {line}" for line in found[:SHOWN])
        more = f"\n  and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        raise CheckpointError(
            f"{path.parent} belongs to a run with another configuration:{listed}{more}",
            hint=_way_out(path, saved, found),
        )


def _way_out(path: Path, saved: Mapping[str, Any], found: Sequence[str]) -> str:
    """Name the command that takes over the finished stages of the run, if the changes come after them."""
    run = path.parent
    elsewhere = "give another output_dir, or the settings of that run to go on with it"
    models = {stage: run / stage / "model" for stage in ("sft", "reward") if (run / stage / "done").exists()}
    changed = {line.partition(".")[0] for line in found}
    start = f"{path} --actor-model {models.get('sft')}"
    if changed == {"ppo"} and len(models) == 2:
        command = f"dovetail ppo {start} --reward-model {models['reward']}"
        after = "SFT and reward model"
    elif changed <= {"reward", "ppo"} and "sft" in models and saved["reward"]["start_from"] == "model":
        command, after = f"dovetail train {start} --step 2 3", "SFT model"
    elif changed == {"dpo"} and "sft" in models:
        command, after = f"dovetail train {start} --step dpo", "SFT model"
    else:
        return elsewhere
    return f"{elsewhere}; for these settings on the same {after}: {command} --output-dir NEW_FOLDER setting=value ..."


def fingerprint(config: Mapping[str, Any]) -> str:
    """SHA-256 of the settings that decide the result, independent of their order."""
    canonical = json.dumps(sorted(_deciding(config).items()), sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def differences(saved: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """One line for each deciding setting that differs: `ppo.gamma: 1.0 in the folder, 0.9 now`."""
    old, new = _deciding(saved), _deciding(given)
    return [
        f"{key}: {_show(old, key)} in the folder, {_show(new, key)} now"
        for key in dict.fromkeys([*new, *old])
        if key not in old or key not in new or old[key] != new[key]
    ]


def flat_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Every setting by its dotted name, as JSON sees it."""
    flat: dict[str, Any] = {}
    _flatten(_plain(config), "", flat)
    return flat


def _deciding(config: Mapping[str, Any]) -> dict[str, Any]:
    flat = flat_settings(config)
    return {key: value for key, value in flat.items() if not any(fnmatchcase(key, p) for p in MAY_CHANGE)}


def _flatten(value: Any, key: str, flat: dict[str, Any]) -> None:
    """Dotted keys; a list of plain values is one setting, a list of mappings is numbered."""
    if isinstance(value, dict) and value:
        for name, item in value.items():
            _flatten(item, f"{key}.{name}" if key else str(name), flat)
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        for i, item in enumerate(value):
            _flatten(item, f"{key}[{i}]", flat)
    else:
        flat[key] = value


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """Convert to what JSON reads back: tuples become lists, keys strings."""
    plain: dict[str, Any] = json.loads(json.dumps(config, default=str))
    return plain


def _show(flat: Mapping[str, Any], key: str) -> str:
    return json.dumps(flat[key], ensure_ascii=False) if key in flat else "not set"
