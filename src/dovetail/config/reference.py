"""The page of all settings, docs/settings.md: `python -m dovetail.config.reference` prints it.

Responsible for: names, types, defaults and meanings as the models beside this file have them.
Not responsible for: errors about settings (explain.py).
"""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from dovetail.config.explain import group_of
from dovetail.config.run import RunConfig

HEAD = """# Settings

Every setting of a run, by the name it has on the command line (`dovetail train opt-1.3b sft.batch_size=16`) and, as
nested keys, in a recipe. [Configuration](configuration.md) explains how they are given. This page is generated from
`src/dovetail/config/` by `make docs-settings`.
"""
_BOUNDS = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}
_NAMES = {
    "integer": "whole number",
    "number": "number",
    "string": "text",
    "boolean": "true or false",
    "null": "null",
}


@dataclass(frozen=True, slots=True)
class _Group:
    """A group of settings at one place of the configuration."""

    path: str
    model: type[BaseModel]
    default: BaseModel | None
    """The group where nothing is set; None for the run itself, and for a group that is absent then."""
    meaning: str = ""

    def defaults(self) -> dict[str, str]:
        """Return the default of each of its own settings, which are no groups but may be lists of them."""
        fields = self.model.model_fields.items()
        own = [name for name, field in fields if group_of(field.annotation) is None or _is_list(field)]
        return {name: self._default(name) for name in own}

    def inner(self) -> Iterator["_Group"]:
        """Yield the group itself, then the groups within, depth first; the items of a list are one."""
        yield self
        for name, field in self.model.model_fields.items():
            inside = group_of(field.annotation)
            if inside is not None:
                default = field.default if self.default is None else getattr(self.default, name)
                path = f"{self.path}.{name}".lstrip(".") + (".N" if _is_list(field) else "")
                meaning = f"{field.description}{' Absent by default (null).' if default is None else ''}"
                kept = default if isinstance(default, inside) else None
                yield from _Group(path, inside, kept, meaning).inner()

    def _default(self, name: str) -> str:
        field = self.model.model_fields[name]
        if self.default is None and field.is_required():
            return "required"
        return f"`{json.dumps(field.default if self.default is None else getattr(self.default, name))}`"


def settings_page() -> str:
    """Return the page: a table for each group of settings, in the order of the configuration."""
    defined = RunConfig.model_json_schema()["$defs"]
    shown: dict[type[BaseModel], tuple[str, dict[str, str]]] = {}
    lines = [HEAD]
    for group in _Group("", RunConfig, None).inner():
        about = f"{group.meaning} {group.model.__doc__ or ''}"
        lines += [f"## {f'`{group.path}`' if group.path else 'The run'}", "", " ".join(about.split()), ""]
        defaults = group.defaults()
        first, theirs = shown.setdefault(group.model, (group.path, {}))
        names = [name for name in defaults if defaults[name] != theirs.get(name)]
        if theirs:
            lines += [f"As `{first}`{', but for these defaults:' if names else '.'}", ""]
        theirs.update({**defaults, **theirs})
        if names:
            rows = (defined.get(group.model.__name__) or RunConfig.model_json_schema())["properties"]
            lines += ["| setting | type | default | meaning |", "| --- | --- | --- | --- |"]
            lines += [_row(f"{group.path}.{n}".lstrip("."), rows[n], defaults[n]) for n in names]
            lines.append("")
    return "\n".join(lines)


def _is_list(field: FieldInfo) -> bool:
    return isinstance(field.default, tuple)


def _row(name: str, schema: Mapping[str, Any], default: str) -> str:
    meaning = " ".join(schema["description"].split())
    cells = (f"`{name}`", _type(schema), default, meaning)
    return f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |"


def _type(schema: Mapping[str, Any]) -> str:
    """Describe the values that a setting takes in words."""
    if "$ref" in schema:
        return "group of settings"
    if "anyOf" in schema:
        return " or ".join(_type(one) for one in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    if schema.get("type") == "array":
        return f"list: {_items(schema)}"
    bounds = [f"{sign} {schema[key]:g}" for key, sign in _BOUNDS.items() if key in schema]
    return " ".join([_NAMES.get(schema.get("type", ""), "any value"), *bounds])


def _items(schema: Mapping[str, Any]) -> str:
    fixed: Sequence[Mapping[str, Any]] = schema.get("prefixItems", ())
    if fixed:
        return ", ".join(_type(one) for one in fixed)
    return _type(schema.get("items", {}))


if __name__ == "__main__":
    sys.stdout.write(settings_page())
