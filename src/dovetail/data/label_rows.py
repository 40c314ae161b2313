"""Labels of people as a source: `labels:` and the URL of the database that keeps them.

Responsible for: such paths. Not responsible for: the pairs that a label stands for (data/labels/comparisons.py).
"""

from __future__ import annotations

from collections.abc import Iterator

from dovetail.data.tables import Placed

_SCHEME = "labels:"


def is_labels(path: str) -> bool:
    """Return whether a source's path means a database of labels."""
    return path.startswith(_SCHEME)


def label_rows(path: str, project: str | None) -> Iterator[Placed]:
    """Yield one row for each pair, of one project or of all."""
    from dovetail.data.labels.comparisons import comparison_rows  # here and not above: files need no database
    from dovetail.data.labels.database import open_store

    store = open_store(path.removeprefix(_SCHEME), must_exist=True)
    try:
        for label_id, row in comparison_rows(store, project):
            yield Placed(f"label {label_id}", row)
    finally:
        store.close()


def without_password(path: str) -> str:
    """Return the path as reports may show it, without the password."""
    from dovetail.data.labels.database import shown

    return _SCHEME + shown(path.removeprefix(_SCHEME))
