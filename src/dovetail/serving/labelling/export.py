"""Write labels to a file of comparisons.

Responsible for: writing the file as a whole or not at all. Not responsible for: its rows (data/labels/comparisons.py).
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from dovetail.data.labels.comparisons import comparison_rows
from dovetail.data.labels.database import Store
from dovetail.errors import LabelError


def export(store: Store, output: Path, project: str | None = None) -> int:
    """Write one JSON line for each pair, of one project or of all, and return the number of lines.

    An existing file is replaced at the end. Raises LabelError if the file cannot be written.
    """
    rows = [row for _, row in comparison_rows(store, project)]
    part = output.with_name(output.name + ".part")
    try:
        with part.open("w", encoding="utf-8") as lines:
            lines.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            lines.flush()
            os.fsync(lines.fileno())
        part.replace(output)
    except OSError as error:
        raise LabelError(
            f"{output}: cannot be written: {error.strerror}", hint="give another --output"
        ) from error
    return len(rows)
