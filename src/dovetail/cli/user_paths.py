"""Read the paths that users type.

Responsible for: `~`, which no shell replaces in `--output=~/answers.jsonl`. Not responsible for: what they hold.
"""

from pathlib import Path


def path(typed: str | Path) -> Path:
    """Replace a leading `~` or `~name` by that home folder; the `parser` of options and arguments that are paths."""
    found = Path(typed)
    return found.expanduser() if str(typed).startswith("~") else found  # ./~ is a file of that name
