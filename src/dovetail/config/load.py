"""A recipe, flags and `a.b=c` overrides in; one checked, frozen RunConfig out.

Responsible for: the order of precedence (recipe, then flags, then overrides), and where each value came from
when it is wrong. Not responsible for: which recipe suits a model (config/recipes.py), nor the words of an
error (config/explain.py).
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import yaml
from pydantic import ValidationError

from dovetail.config.data import spelt_out
from dovetail.config.explain import config_error, dotted
from dovetail.config.recipes import find_recipe, is_kin, is_shipped
from dovetail.config.run import RunConfig
from dovetail.config.yaml_source import Path as SettingPath
from dovetail.config.yaml_source import read_yaml
from dovetail.errors import ConfigError
from dovetail.text_file import read_text

Origins: TypeAlias = dict[SettingPath, str]
_PATHS: tuple[SettingPath, SettingPath] = (("actor", "path"), ("reward_model", "path"))
_SHORT: dict[SettingPath, Callable[[str], dict[str, str]]] = {
    ("data", "blend", "*"): spelt_out,
    ("data", "pretraining", "*"): spelt_out,
    ("ppo", "reward_function", "*"): lambda text: {"function": text},
    ("ppo", "environment"): lambda text: {"source": text},
}
"""The groups that a text may stand for, and what it is short for; * is an item of a list."""


def load(
    recipe: str | None, overrides: Sequence[str] = (), flags: Mapping[str, tuple[str, Any]] | None = None
) -> RunConfig:
    """Load the configuration of a run.

    `recipe` is a file or the name of a recipe that comes with the package; `flags` maps a setting's dotted
    name to (the flag that gave it, its value); an override is `setting=value` with the value in YAML.
    """
    values: dict[str, Any] = {}
    origins: Origins = {}
    file = None if recipe is None else find_recipe(recipe)
    if file is not None:
        values, origins = read_recipe(file)
    for name, (flag, value) in (flags or {}).items():
        _set(values, origins, tuple(name.split(".")), value, origin=flag)
    for override in overrides:
        _apply_override(values, origins, override)
    if file is not None and is_shipped(file):
        _leave_out_foreign_reward_model(values, origins, str(file))
    return check(values, origins)


def _leave_out_foreign_reward_model(values: dict[str, Any], origins: Origins, recipe: str) -> None:
    """Let the reward model start from the actor where the recipe's is of another family than the actor given."""
    actor, reward_model = values.get("actor"), values.get("reward_model")
    if not isinstance(actor, dict) or not isinstance(reward_model, dict):
        return
    is_given = {path: not origins.get(path, "").startswith(recipe) for path in _PATHS}
    paths = [str(group.get("path")) for group in (actor, reward_model)]
    if is_given[_PATHS[0]] and not is_given[_PATHS[1]] and not is_kin(*paths):
        changed = {key: value for key, value in reward_model.items() if key != "path"}
        values["reward_model"] = {**actor, **changed} if changed else None


def read_recipe(file: Path) -> tuple[dict[str, Any], Origins]:
    """Read the settings in a file, unchecked, and the line of each."""
    try:
        text = read_text(file)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read: {error}", hint="give a YAML file in UTF-8") from error
    values, lines = read_yaml(text, str(file))
    if not isinstance(values, dict):
        raise ConfigError(
            f"{file}: a recipe is a mapping of settings, this is {type(values).__name__}",
            hint="start from one that works: `dovetail train opt-1.3b --dry-run` prints it in full",
        )
    return values, {path: f"{file} line {line}" for path, line in lines.items() if path}


def check(values: Mapping[str, Any], origins: Mapping[SettingPath, str] | None = None) -> RunConfig:
    """Make a configuration of these values; a ConfigError names each that is wrong and where it was given."""
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise config_error(error, RunConfig, origins or {}) from error


def dump(config: RunConfig) -> str:
    """Every setting with its value, as YAML that `load` reads back to the same configuration."""
    values = config.model_dump(mode="json")
    for name in ("blend", "pretraining"):  # a source has many settings, and uses few
        sources = getattr(config.data, name)
        values["data"][name] = [source.model_dump(mode="json", exclude_defaults=True) for source in sources]
    text: str = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=100)
    return text


def parse_value(text: str, source: str) -> Any:
    """Parse a value as written on the command line, in YAML: 3, 1e-5, true, null, [a, b:2], {path: x}, or plain
    words."""
    return read_yaml(text, source).values


def _apply_override(values: dict[str, Any], origins: Origins, override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise ConfigError(
            f"{override!r} is not an override",
            hint="write setting=value, such as ppo.kl_coefficient=0.02; quote it when the value has spaces",
        )
    origin = f"override {override!r}"
    _set(values, origins, _parts(name), parse_value(text, origin), origin=origin)


def _parts(name: str) -> SettingPath:
    return tuple(int(part) if part.isdecimal() else part for part in name.split("."))


def _set(values: dict[str, Any], origins: Origins, path: SettingPath, value: Any, *, origin: str) -> None:
    group: Any = values
    for depth, part in enumerate(path[:-1], start=1):
        if isinstance(group, dict) and group.get(str(part)) is None:
            group[str(part)] = {}  # an absent or null group, such as actor.lora, begins empty
        item = _item(group, part, path[:depth], origin)
        short = _SHORT.get(tuple("*" if isinstance(place, int) else place for place in path[:depth]))
        if isinstance(item, str) and short is not None:
            item = group[part] = short(item)
        group = item
    if isinstance(group, dict):
        group[str(path[-1])] = value
    else:
        _item(group, path[-1], path, origin)
        group[path[-1]] = value
    for known in [known for known in origins if known[: len(path)] == path]:
        del origins[known]
    origins[path] = origin


def _item(group: Any, part: str | int, path: SettingPath, origin: str) -> Any:
    """`group[part]`, or an error that says what stands there instead."""
    if isinstance(group, dict):
        return group.get(str(part))
    if not isinstance(group, list):
        raise ConfigError(
            f"{origin}: {dotted(path[:-1])} is the value {group!r}, which has no parts",
            hint=f"set {dotted(path[:-1])} itself",
        )
    if not isinstance(part, int) or part >= len(group):
        raise ConfigError(
            f"{origin}: {dotted(path[:-1])} is a list of {len(group)}, and {part} is not an index of it",
            hint=f"count from 0, or set the whole list: {dotted(path[:-1])}='[...]'",
        )
    return group[part]
