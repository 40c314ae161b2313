"""Explain each setting: docs/settings.md, printed by `python -m dovetail.config.reference`, and `dovetail explain`.

Responsible for: names, types, defaults and meanings as the models beside this file have them, everyday and advanced.
Not responsible for: errors about settings (explain.py).
"""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic.fields import FieldInfo

from dovetail.config.explain import group_of, nearest
from dovetail.config.frozen import FrozenModel
from dovetail.config.run import RunConfig
from dovetail.errors import ConfigError

HEAD = """# Settings

Every setting of a run, by the name it has on the command line (`dovetail train opt-1.3b sft.batch_size=16`) and, as
nested keys, in a recipe. [Configuration](configuration.md) explains how they are given. This page is generated from
`src/dovetail/config/` by `make docs-settings`; `dovetail explain ppo.kl_coefficient` says the same of one setting.

These {count} settings are what most runs need; what several groups have alike is listed once. Those for experts follow
[below](#advanced): their defaults are meant to stay.
"""
ADVANCED = """## Advanced

Settings for experts, given in the same way and under the same names. Their defaults come from the papers named beside
them or from measurements; a run that changes one should be able to say why.
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
    model: type[FrozenModel]
    default: FrozenModel | None
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
    """Return the page: the settings of each group in the order of the configuration, those for experts after all."""
    introduced: set[str] = set()
    everyday, advanced = _tables(introduced, are_advanced=False), _tables(introduced, are_advanced=True)
    count = sum(line.startswith("| `") for line in everyday)
    return "\n".join([HEAD.format(count=count), *everyday, ADVANCED, *advanced])


def _tables(introduced: set[str], *, are_advanced: bool) -> list[str]:
    """Return the lines of all groups' tables; what an earlier group says alike is named and not said again.

    introduced: the groups that were introduced, to which these are added.
    """
    said: dict[tuple[str, str, str], str] = {}
    lines: list[str] = []
    for group in _Group("", RunConfig, None).inner():
        defaults, rows = group.defaults(), _properties(group.model)
        rows_here: list[str] = []
        as_there: dict[str, list[str]] = {}
        for name, default in defaults.items():
            if (name in group.model.advanced) != are_advanced:
                continue
            key = (name, rows[name]["description"], default)
            if key in said:
                as_there.setdefault(said[key], []).append(f"`{name}`")
            else:
                said[key] = group.path
                rows_here.append(_row(f"{group.path}.{name}".lstrip("."), rows[name], default))
        if not rows_here and not as_there:
            continue
        about = (
            ""
            if group.path in introduced
            else " ".join(f"{group.meaning} {group.model.__doc__ or ''}".split())
        )
        introduced.add(group.path)
        lines += [f"{'###' if are_advanced else '##'} {f'`{group.path}`' if group.path else 'The run'}", ""]
        lines += [about, ""] if about else []
        lines += [
            line
            for place, names in as_there.items()
            for line in (f"As in `{place}`: {', '.join(names)}.", "")
        ]
        if rows_here:
            lines += ["| setting | type | default | meaning |", "| --- | --- | --- | --- |", *rows_here, ""]
    return lines


def _properties(model: type[FrozenModel]) -> Mapping[str, Any]:
    schema = RunConfig.model_json_schema()
    properties: Mapping[str, Any] = (schema["$defs"].get(model.__name__) or schema)["properties"]
    return properties


def explanation(name: str) -> str:
    """Explain a setting, or list those of a group; `name` is what the command line takes, and may name a list's item.

    Raises ConfigError that suggests the nearest name if there is none such.
    """
    wanted = ".".join(part for part in name.split(".") if not part.isdigit() and part != "N")
    for group in _Group("", RunConfig, None).inner():
        place, rows, defaults = group.path.replace(".N", ""), _properties(group.model), group.defaults()
        if wanted == place:
            about = " ".join(f"{group.meaning} {group.model.__doc__ or ''}".split())
            width = max(map(len, rows))
            listed = [f"  {n:{width}}  {_first_sentence(row['description'])}" for n, row in rows.items()]
            return "\n".join([f"{group.path}: a group of settings. {about}", "", *listed])
        last = wanted.removeprefix(f"{place}.") if place else wanted
        if last in defaults:
            expert = "; for experts" if last in group.model.advanced else ""
            meaning = " ".join(rows[last]["description"].split())
            default = defaults[last].strip("`")
            full = f"{group.path}.{last}".lstrip(".")
            return f"{full}: {_type(rows[last])}, default {default}{expert}\n  {meaning}".replace("`", "")
    raise ConfigError(f"{name} is not a setting", hint=nearest(tuple(wanted.split(".")), RunConfig))


def _first_sentence(text: str) -> str:
    return " ".join(text.split()).split(". ")[0].rstrip(".") + "."


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
