"""Which models a path means.

Responsible for: finding the chat models of a run, and its reward model. Not responsible for: loading them (load.py).
"""

from pathlib import Path

from dovetail.errors import ModelError

_CHAT_MODELS = {"ppo": "ppo/model", "ppo-ema": "ppo/model_ema", "sft": "sft/model"}
"""Of a run, the best first."""


def model_folder(path: str) -> str:
    """The best finished chat model in a run folder; anything else is the name of a model itself."""
    return next(iter(chat_models(path).values()))


def chat_models(path: str) -> dict[str, str]:
    """Name -> place of every finished chat model in a run folder, the best first; a model itself is alone, and
    named after its folder or file. Raises ModelError for a folder that is neither.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir() or any(folder.glob("*.gguf")) or _is_model(folder):
        return {folder.stem if folder.suffix == ".gguf" else folder.absolute().name: path}
    found = {name: str(folder / place) for name, place in _CHAT_MODELS.items() if _is_model(folder / place)}
    if not found.keys() - {"ppo-ema"}:
        raise ModelError(
            f"{path}: neither a model nor a run with a finished one",
            hint=f"finish its training first: dovetail train {path}/config.yaml"
            if (folder / "config.yaml").is_file()
            else "give a run folder with sft/model or ppo/model, or a folder with config.json",
        )
    return found


def reward_folder(path: str) -> str:
    """The finished reward model in a run folder; anything else is the name of a model itself."""
    inside = Path(path).expanduser() / "reward" / "model"
    return str(inside) if (inside / "config.json").is_file() else path


def _is_model(folder: Path) -> bool:
    return (folder / "config.json").is_file() or (folder / "adapter_config.json").is_file()
