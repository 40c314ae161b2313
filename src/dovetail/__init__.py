"""Dovetail: a pretrained language model in, a chat model trained with human feedback out.

Responsible for: the version and the public names. Imports nothing heavy: names load on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from dovetail.data.records import Prompt
    from dovetail.engine.sampling import Sampling
    from dovetail.rlhf.api import PPOTrainer, RLHFEngine
    from dovetail.serving.inference.chat_model import ChatModel
    from dovetail.stages.functions import Trained, train_dpo, train_ppo, train_reward, train_sft

_PUBLIC = {
    "ChatModel": "dovetail.serving.inference.chat_model",
    "PPOTrainer": "dovetail.rlhf.api",
    "Prompt": "dovetail.data.records",
    "RLHFEngine": "dovetail.rlhf.api",
    "Sampling": "dovetail.engine.sampling",
    "Trained": "dovetail.stages.functions",
    "train_dpo": "dovetail.stages.functions",
    "train_ppo": "dovetail.stages.functions",
    "train_reward": "dovetail.stages.functions",
    "train_sft": "dovetail.stages.functions",
}

__all__ = [
    "ChatModel",
    "PPOTrainer",
    "Prompt",
    "RLHFEngine",
    "Sampling",
    "Trained",
    "__version__",
    "train_dpo",
    "train_ppo",
    "train_reward",
    "train_sft",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'dovetail' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
