"""Dovetail: a pretrained language model in, a chat model trained with human feedback out.

Responsible for: the version and the public names. Imports nothing heavy: names load on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from dovetail.rlhf.api import PPOTrainer, RLHFEngine

_PUBLIC = {"RLHFEngine": "dovetail.rlhf.api", "PPOTrainer": "dovetail.rlhf.api"}

__all__ = ["PPOTrainer", "RLHFEngine", "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'dovetail' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
