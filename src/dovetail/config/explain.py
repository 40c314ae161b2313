"""Say what is wrong with a configuration in words that lead to the repair.

Responsible for: turning pydantic's errors into one ConfigError that names the setting, where it was given,
what was found, and the nearest right name. Not responsible for: which values are right (the models beside
this file).
"""

import difflib
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from dovetail.config.frozen import FrozenModel
from dovetail.config.yaml_source import Path
from dovetail.errors import ConfigError

Model = type[FrozenModel]


def config_error(error: ValidationError, root: Model, origins: Mapping[Path, str]) -> ConfigError:
    """One error that lists every wrong setting of a configuration of type `root`; `origins` says who gave
    each."""
    details = [detail | {"loc": _setting(detail["loc"], root)} for detail in error.errors()]
    messages = [_origin(origins, detail) + _message(detail) for detail in details]
    hints = list(dict.fromkeys(hint for detail in details if (hint := _hint(detail, root))))
    return ConfigError("\n".join(dict.fromkeys(messages)), hint="; ".join(hints) or None)


def dotted(path: Path) -> str:
    """Return the path as one writes it on the command line."""
    return ".".join(str(part) for part in path)


def setting_names(model: Model, prefix: Path = ()) -> Iterator[Path]:
    """Yield the path of every setting below a model, depth first; groups of settings included."""
    for name, field in model.model_fields.items():
        yield (*prefix, name)
        inner = group_of(field.annotation)
        if inner is not None:
            yield from setting_names(inner, (*prefix, name))


def _origin(origins: Mapping[Path, str], detail: ErrorDetails) -> str:
    path = detail["loc"]
    if detail["type"] == "value_error":  # of several settings together: no one place is to blame
        return ""
    for length in range(len(path), 0, -1):
        if path[:length] in origins:
            return f"{origins[path[:length]]}: "
    return ""


def _message(detail: ErrorDetails) -> str:
    name = dotted(detail["loc"]) or "the configuration"
    match detail["type"]:
        case "extra_forbidden":
            return f"{name} is not a setting"
        case "missing":
            return f"{name} is missing"
        case "model_type":
            return f"{name} = {detail['input']!r}: this is a group of settings, not one value"
        case "tuple_type":
            return f"{name} = {detail['input']!r}: this is a list, such as [{detail['input']}]"
        case "too_short":
            return f"{name} = {detail['input']!r}: this is a list of at least {detail['ctx']['min_length']}"
        case "value_error":
            message = detail["msg"].removeprefix("Value error, ")
            return f"{name}: {message}" if detail["loc"] else message
        case _:
            reason = detail["msg"].removeprefix("Input ").replace("valid tuple", "list")
            return f"{name} = {detail['input']!r}: {reason}"


def _hint(detail: ErrorDetails, root: Model) -> str | None:
    path = detail["loc"]
    if detail["type"] == "extra_forbidden":
        return nearest(path, root)
    if detail["type"] == "value_error":
        return None
    while path and isinstance(path[-1], int):  # an item of a list is described with the list
        path = path[:-1]
    field = _field(path, root)
    return f"{dotted(path)}: {' '.join(field.description.split())}" if field and field.description else None


def nearest(path: Path, root: Model) -> str:
    """Suggest the setting of this group with the nearest name, else the nearest anywhere, else what the group has."""
    wrong = str(path[-1])
    group = _group_at(path[:-1], root)
    siblings = list(group.model_fields) if group else []
    if close := difflib.get_close_matches(wrong, siblings, n=1):
        return f"did you mean {dotted((*path[:-1], close[0]))}?"
    elsewhere = {dotted(names): str(names[-1]) for names in setting_names(root)}
    inside = [name for name in elsewhere if name.startswith(f"{dotted(path[:-1])}.")] if path[:-1] else []
    for names in (inside, list(elsewhere)):  # lr means learning_rate: rather in this group than elsewhere
        if meant := [name for name in names if wrong.lower() == _initials(elsewhere[name])]:
            return f"did you mean {' or '.join(meant)}?"
    if close := difflib.get_close_matches(wrong, elsewhere.values(), n=1):
        return f"did you mean {' or '.join(name for name, last in elsewhere.items() if last == close[0])}?"
    return f"settings of {dotted(path[:-1]) or 'a run'}: {', '.join(siblings)}"


def _initials(name: str) -> str:
    """Return the short form of a name of several words: lr for learning_rate."""
    words = name.split("_")
    return "".join(word[:1] for word in words) if len(words) > 1 else ""


def _setting(path: Path, root: Model) -> Path:
    """Return the path of the setting itself; below one of several types pydantic names each of them."""
    kept: list[str | int] = []
    group: Model | None = root
    for part in path:
        if isinstance(part, str):
            if group is None:
                break
            field = group.model_fields.get(part)
            group = group_of(field.annotation) if field else None
        kept.append(part)
    return tuple(kept)


def _field(path: Path, root: Model) -> Any:
    group = _group_at(path[:-1], root)
    return group.model_fields.get(str(path[-1])) if group and path else None


def _group_at(path: Path, root: Model) -> Model | None:
    group: Model | None = root
    for part in path:
        if isinstance(part, int):  # an item of a list has the list's item type
            continue
        field = group.model_fields.get(part) if group else None
        group = group_of(field.annotation) if field else None
    return group


def group_of(annotation: Any) -> Model | None:
    """Return the configuration model inside `Model`, `Model | None` or `tuple[Model, ...]`, if there is one."""
    if isinstance(annotation, type) and issubclass(annotation, FrozenModel):
        return annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, tuple):
        return next((found for part in typing.get_args(annotation) if (found := group_of(part))), None)
    return None
