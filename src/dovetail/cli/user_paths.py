"""Files and folders as they are typed.

Responsible for: `~`, which no shell replaces in `--output=~/answers.jsonl`. Not responsible for: what is in them.
"""

from pathlib import Path


def path(typed: str | Path) -> Path:
    """Replace a leading `~` or `~name` by that home folder; the `parser` of options and arguments that are paths."""
    found = Path(typed)
    return found.expanduser() if str(typed).startswith("~") else found  # ./~ is a file of that name
