"""Files and folders as they are typed.

Responsible for: `~`, which no shell replaces in `--output=~/answers.jsonl`. Not responsible for: what is in them.
"""

from pathlib import Path


def path(typed: str) -> Path:
    """Replace a leading `~` or `~name` by that home folder; the `parser` of options and arguments that are paths."""
    return Path(typed).expanduser()
