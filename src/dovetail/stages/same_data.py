"""A stage goes on with the data that it began with, or not at all.

Responsible for: fingerprints of rows, tokenizer and chat template, kept with the state of a stage.
Not responsible for: settings (runs/run_identity.py), the state itself (runs/checkpoint.py).
"""

from collections.abc import Mapping
from pathlib import Path

from dovetail.errors import CheckpointError
from dovetail.text.chat_format import ChatFormat
from dovetail.text.content_hash import content_hash


class SameData:
    """The fingerprints of what a stage learns from, as a part of its state."""

    def __init__(self, stage: Path, chat: ChatFormat, *rows: str) -> None:
        """Take the stage's folder, its chat format, and fingerprints of the rows it learns from and is judged on."""
        self._stage = stage
        self._now = {"rows": content_hash(*rows), "tokenizer or chat template": chat.fingerprint}

    def state_dict(self) -> dict[str, str]:
        """Return the fingerprints."""
        return dict(self._now)

    def load_state_dict(self, saved: Mapping[str, str]) -> None:
        """Raise CheckpointError if the stage would go on with other data than it began with."""
        changed = [name for name, now in self._now.items() if saved[name] != now]
        if changed:
            raise CheckpointError(
                f"{self._stage.name}: the {' and the '.join(changed)} changed since the stage began: it would repeat "
                "some rows, miss others and end elsewhere",
                hint=f"restore what it began with, or delete {self._stage} to begin the stage anew (rows also change "
                "with `stages`, where data.stage_split is not set)",
            )
