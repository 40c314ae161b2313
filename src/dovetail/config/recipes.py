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
ABOUT_AS_NEAR = 3
"""The recipe of another size by this factor still suits better if it is of the model's own family."""
_SIZE = re.compile(r"(?<![0-9.a-z])(?:(\d+)x)?(\d+(?:\.\d+)?)\s?([mb])(?![a-z0-9])", re.IGNORECASE)


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
    """Return whether `text` is the path of a file; a text too long for any path is none."""
    try:
        return Path(text).expanduser().is_file()
    except OSError:
        return False


def find_recipe(name: str) -> Path:
    """Return the file of a recipe given as a path, or as the name of one that comes with the package."""
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
    """Return the recipe nearest in size; among those about as near, one of the model's own family."""
    shape = _read_shape(model)
    size = _count_parameters(shape) or _size(Path(model).name)
    same = [name for name in recipe_names() if _family(name) == _family_of(model, shape)]
    if size is None:
        kin = "same family" if same else "no recipe of its family"
        smallest = min(same or recipe_names(), key=lambda name: _size(name) or 1)
        return Choice(smallest, f"{kin}, size unknown: the smallest")
    distance = {name: abs(math.log((_size(name) or 1) / size)) for name in recipe_names()}
    about = min(distance.values()) + math.log(ABOUT_AS_NEAR)
    near = [name for name in same if distance[name] <= about]
    kin = "same family" if near else "no recipe of its family is about as large"
    return Choice(
        min(near or distance, key=distance.__getitem__), f"{kin}, nearest in size to {_shown(size)}"
    )


def is_shipped(recipe: Path) -> bool:
    """Return whether this file comes with the package."""
    return recipe.parent.resolve() == FOLDER.resolve()


def is_kin(model: str, other: str) -> bool:
    """Return whether two models are of one family and generation, so that one can judge what the other writes."""
    return _generation(model, _read_shape(model)) == _generation(other, _read_shape(other))


def _family_of(model: str, shape: Mapping[str, Any]) -> str:
    """Return the family that the config names, else the first known one in the name."""
    if "model_type" in shape:
        return _family(str(shape["model_type"]))
    known = {_family(name) for name in recipe_names()}
    words = [_family(word) for word in re.split(r"[^a-zA-Z]+", Path(model).name) if word]
    return next((word for word in words if word in known), _family(Path(model).name))


def _generation(model: str, shape: Mapping[str, Any]) -> str:
    """Return the family and the number behind it, which is no size: qwen3, llama3, opt."""
    family = _family_of(model, shape)
    name = str(shape.get("model_type") or Path(model).name).lower().replace("smollm", "smol")
    number = re.search(rf"{family}[-_ ]?(\d+)(?![\d.]*[mb])", name)
    return f"{family}{number[1]}" if number else family


def _shown(size: float) -> str:
    """Format the number of parameters as people write it: 1.3 B, 0.1 M."""
    return f"{size / 1e9:.3g} B parameters" if size >= 1e9 else f"{size / 1e6:.3g} M parameters"


def _family(name: str) -> str:
    return re.split(r"[^a-z]", name.lower().replace("smollm", "smol"), maxsplit=1)[0]


def _size(name: str) -> float | None:
    """Parameters as the name states them: opt-1.3b -> 1.3e9, mixtral-8x7b -> 56e9."""
    found = _SIZE.search(name)
    return int(found[1] or 1) * float(found[2]) * {"m": 1e6, "b": 1e9}[found[3].lower()] if found else None


def _read_shape(model: str) -> Mapping[str, Any]:
    given = Path(model).expanduser()
    file = given if given.suffix == ".json" else given / "config.json"
    if not file.is_file():
        return {}
    try:
        shape = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{file}: not valid JSON: {error}", hint="copy the model folder anew") from error
    return shape if isinstance(shape, dict) else {}


def _count_parameters(shape: Mapping[str, Any]) -> float | None:
    """Roughly: 12 D^2 a layer and the embedding, enough to choose among recipes a factor of two apart.

    None for a mixture of experts, whose name says more.
    """
    width = shape.get("hidden_size") or shape.get("n_embd")
    layers = shape.get("num_hidden_layers") or shape.get("n_layer")
    if not width or not layers or any("experts" in key for key in shape):
        return None
    return float(12 * layers * width**2 + shape.get("vocab_size", 0) * width)
