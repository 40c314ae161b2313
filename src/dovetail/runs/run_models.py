"""The models that a path names.

Responsible for: finding the chat models of a run, and its reward model. Not responsible for: loading them (load.py).
"""

from pathlib import Path

from dovetail.errors import ModelError

_CHAT_MODELS = {"ppo": "ppo/model", "ppo-ema": "ppo/model_ema", "dpo": "dpo/model", "sft": "sft/model"}
"""The chat models of a run, the best first."""


def model_folder(path: str) -> str:
    """Return the best finished chat model in a run folder; any other path names a model itself."""
    return next(iter(chat_models(path).values()))


def chat_models(path: str) -> dict[str, str]:
    """Map the names of the finished chat models in a run folder, the best first, to their places.

    A path to a model itself gives that one alone, named after its folder or file. Raises ModelError for a folder that
    is neither.
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
            else "give a run folder with sft/model, ppo/model or dpo/model, or a folder with config.json",
        )
    return found


def reward_folder(path: str) -> str:
    """Return the finished reward model in a run folder; any other path names a model itself."""
    inside = Path(path).expanduser() / "reward" / "model"
    return str(inside) if (inside / "config.json").is_file() else path


def _is_model(folder: Path) -> bool:
    return (folder / "config.json").is_file() or (folder / "adapter_config.json").is_file()
