"""Flags that take several values after one name, as in `--step 1 2 3`.

Responsible for: rewriting them as one flag per value, which is what the command parser reads.
Not responsible for: what the values mean.
"""

import re
from collections.abc import Sequence

# The values that a list can hold. Another flag or an override `a.b=c` ends it. A step is one of a few words, so that
# any other word ends it too.
_VALUES = {
    "--step": re.compile(r"[123]|sft|reward|ppo"),
    "--data": re.compile(r"(?!-)(?![a-z_][a-z_0-9.]*=).+", re.DOTALL),
}


def repeat_flags(argv: Sequence[str]) -> list[str]:
    """Rewrite `--step 1 2` as `--step 1 --step 2`, and leave everything else as it is."""
    rewritten: list[str] = []
    flag = None
    for argument in argv:
        if argument in _VALUES:
            flag = argument
            continue
        if flag is not None and _VALUES[flag].fullmatch(argument):
            rewritten += [flag, argument]
            continue
        if flag is not None and rewritten[-2:-1] != [flag]:
            rewritten.append(flag)  # it had no value: let the parser say so
        flag = None
        rewritten.append(argument)
    if flag is not None and rewritten[-2:-1] != [flag]:
        rewritten.append(flag)
    return rewritten
