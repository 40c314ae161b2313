"""Find the recipes that come with the package, and the one that suits a model.

Responsible for: names, files, and choosing by family and size. Not responsible for: reading them
(config/load.py).
"""

import difflib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dovetail.errors import ConfigError

FOLDER = Path(__file__).parent.parent / "recipes"
_SIZE = re.compile(r"(?<![0-9.a-z])(\d+(?:\.\d+)?)\s?([mb])(?![a-z0-9])", re.IGNORECASE)


class Choice(NamedTuple):
    """A recipe for a model, and why this one."""

    recipe: str
    reason: str


def recipe_names() -> tuple[str, ...]:
    """Names of the recipes that come with the package, smallest model first within a family."""
    return tuple(
        sorted(
            (path.stem for path in FOLDER.glob("*.yaml")), key=lambda name: (_family(name), _size(name) or 0)
        )
    )


def names_file(text: str) -> bool:
    """Whether `text` is the path of a file; a text too long for any path is none."""
    try:
        return Path(text).expanduser().is_file()
    except OSError:
        return False


def find_recipe(name: str) -> Path:
    """The file of a recipe given as a path, or as the name of one that comes with the package."""
    given = Path(name).expanduser()
    if names_file(name):
        return given
    plain = given.name.removesuffix(".yaml")
    if plain in recipe_names() and str(given.parent) in (".", "recipes"):
        return FOLDER / f"{plain}.yaml"
    close = difflib.get_close_matches(plain, recipe_names(), n=1)
    guess = f"did you mean {close[0]}? " if close else ""
    raise ConfigError(
        f"{name}: no such recipe, neither a file nor one that comes with Dovetail",
        hint=f"{guess}there are: {', '.join(recipe_names())}",
    )


def recipe_for(model: str) -> Choice:
    """The recipe of the model's own family nearest in size, else the nearest in size of all."""
    shape = _read_shape(model)
    size = _size(Path(model).name) or _count_parameters(shape)
    family = _family(str(shape.get("model_type") or Path(model).name))
    same = [name for name in recipe_names() if _family(name) == family]
    candidates = same or list(recipe_names())
    kin = "same family" if same else "no recipe of its family"
    if size is None:
        return Choice(
            min(candidates, key=lambda name: _size(name) or 1), f"{kin}, size unknown: the smallest"
        )
    nearest = min(candidates, key=lambda name: abs(math.log((_size(name) or 1) / size)))
    return Choice(nearest, f"{kin}, nearest in size")


def _family(name: str) -> str:
    return re.split(r"[^a-z]", name.lower().replace("smollm", "smol"), maxsplit=1)[0]


def _size(name: str) -> float | None:
    """Parameters as the name states them: opt-1.3b -> 1.3e9."""
    found = _SIZE.search(name)
    return float(found[1]) * {"m": 1e6, "b": 1e9}[found[2].lower()] if found else None


def _read_shape(model: str) -> Mapping[str, Any]:
    file = Path(model).expanduser() / "config.json"
    if not file.is_file():
        return {}
    try:
        shape = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{file}: not valid JSON: {error}", hint="copy the model folder anew") from error
    return shape if isinstance(shape, dict) else {}


def _count_parameters(shape: Mapping[str, Any]) -> float | None:
    """Roughly: 12 D^2 a layer and the embedding. Enough to choose among recipes a factor of two apart."""
    width = shape.get("hidden_size") or shape.get("n_embd")
    layers = shape.get("num_hidden_layers") or shape.get("n_layer")
    if not width or not layers:
        return None
    return float(12 * layers * width**2 + shape.get("vocab_size", 0) * width)
