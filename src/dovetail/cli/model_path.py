"""Which model a path on the command line means.

Responsible for: finding the chat model, or the reward model, of a run. Not responsible for: loading it (model/load.py).
"""

from pathlib import Path

from dovetail.errors import ModelError


def model_folder(path: str) -> str:
    """The best finished chat model in a run folder; anything else is the name of a model itself."""
    folder = Path(path).expanduser()
    if not folder.is_dir() or (folder / "config.json").is_file() or any(folder.glob("*.gguf")):
        return path
    for stage in ("ppo", "sft"):
        if (folder / stage / "model" / "config.json").is_file():
            return str(folder / stage / "model")
    raise ModelError(
        f"{path}: neither a model nor a run with a finished one",
        hint=f"finish its training first: dovetail train {path}/config.yaml"
        if (folder / "config.yaml").is_file()
        else "give a run folder with sft/model or ppo/model, or a folder with config.json",
    )


def reward_folder(path: str) -> str:
    """The finished reward model in a run folder; anything else is the name of a model itself."""
    inside = Path(path).expanduser() / "reward" / "model"
    return str(inside) if (inside / "config.json").is_file() else path
