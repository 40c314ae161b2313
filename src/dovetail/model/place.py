"""The place of a model: a folder, a .gguf file, or a name on the hub.

Responsible for: refusing places that hold no model, saying what they hold, before anything is read.
Not responsible for: reading (load.py), which model of a run is meant (run_models.py).
"""

from __future__ import annotations

from pathlib import Path

from dovetail.errors import ModelError
from dovetail.text.hub_names import expect_available
from dovetail.text.model_folder import expect_downloaded, is_adapter
from dovetail.text.tokenizer import only_gguf_in


def existing(path: str | Path, revision: str | None = None) -> str:
    """Return the path or hub name; raise ModelError for a local path that holds no model, before the hub is asked."""
    given, place = str(path), Path(path).expanduser()
    if place.is_dir():
        expect_downloaded(place)
        has_model = (place / "config.json").exists() or gguf_in(str(place)) is not None
        if is_adapter(place) or not has_model:
            raise ModelError(
                f"{given} holds no model: it has "
                + ("an adapter alone" if has_model else "neither config.json nor a .gguf file"),
                hint=_what_lies_in(place),
            )
        return str(place)
    is_path = given.endswith(".gguf")
    expect_available(given, kind="model", error=ModelError, is_path=is_path, revision=revision)
    if place.is_file():
        expect_downloaded(place)
    if place.is_file() and place.suffix != ".gguf":
        raise ModelError(
            f"{given} is a single file", hint="give the folder that holds config.json and the weights"
        )
    return str(place) if place.exists() else given


def _what_lies_in(folder: Path) -> str:
    if (folder / "adapter_config.json").exists():
        return (
            "it is a LoRA adapter: give the merged model's folder, beside it and without `_adapter`, or merge it with "
            "`dovetail export`"
        )
    inside = sorted(child.name for child in folder.iterdir() if (child / "config.json").exists())
    if inside:
        return f"there are models inside it: {', '.join(str(folder / name) for name in inside[:3])}"
    return "give a folder that `save_pretrained` wrote, with config.json and model.safetensors"


def gguf_in(name: str) -> Path | None:
    """Return the GGUF file that `name` is or holds; None for a folder with a config.json, or where there is none."""
    place = Path(name)
    if place.suffix == ".gguf" and place.is_file():
        return place
    if not place.is_dir() or (place / "config.json").exists():
        return None
    return only_gguf_in(place)
