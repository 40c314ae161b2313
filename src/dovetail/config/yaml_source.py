"""Read YAML into plain values, remembering on which line each one stands.

Responsible for: syntax errors with their line, doubled keys, and scalars as YAML 1.2 has them (1e-5 is a
number, `no` is a word, 5:1 is no sexagesimal). Not responsible for: what the values mean (config/load.py).
"""

import re
from typing import Any, ClassVar, NamedTuple

import yaml

from dovetail.errors import ConfigError

Path = tuple[str | int, ...]
"""The place of a value: keys and list indices from the root."""


class Located(NamedTuple):
    """Plain values, and for each path the line it was read from (1-based)."""

    values: Any
    lines: dict[Path, int]


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: ClassVar[dict[str, list[tuple[str, re.Pattern[str]]]]] = {}  # type: ignore[misc]


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|false|False)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"^[-+]?(?:0|[1-9][0-9_]*)$"), list("-+0123456789")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.(?:inf|nan))$"
    ),
    list("-+0123456789."),
)


def read_yaml(text: str, source: str) -> Located:
    """Values and lines of one YAML document; `source` names it in errors."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        lines: dict[Path, int] = {}
        if node is None:
            return Located(None, lines)
        _locate(node, (), lines, source)
        return Located(loader.construct_document(node), lines)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{source} line {mark.line + 1}" if mark else source
        raise ConfigError(
            f"{where}: not valid YAML: {error.problem}",
            hint="check indentation, quotes and brackets there; `key: value` needs the space after the colon",
        ) from error
    except yaml.YAMLError as error:
        raise ConfigError(
            f"{source}: not valid YAML: {error}", hint="save the file as plain UTF-8 text"
        ) from error
    except RecursionError:
        raise ConfigError(
            f"{source}: a value contains itself, or is nested too deeply",
            hint="write it out, without & and *",
        ) from None
    except (ValueError, LookupError, AttributeError) as error:  # what PyYAML raises where a tag does not fit
        raise ConfigError(
            f"{source}: a value is not what it is marked as, or too long: {error}",
            hint="leave out marks such as !!int; put words in quotes",
        ) from error


def _locate(node: yaml.Node, path: Path, lines: dict[Path, int], source: str) -> None:
    lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*path, str(key.value))
            line = key.start_mark.line + 1
            if here in lines:
                raise ConfigError(
                    f"{source} line {line}: {key.value} is given twice, first on line {lines[here]}",
                    hint="keep one of the two",
                )
            lines[here] = line
            _locate(value, here, lines, source)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            _locate(value, (*path, index), lines, source)
