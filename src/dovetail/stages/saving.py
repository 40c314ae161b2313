"""Finished models of a stage, written once however many processes hold them.

Responsible for: gathering a model for its folder. Not responsible for: the folder's contents (model/save.py).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dovetail.model import save
from dovetail.parallel.shard import whole_model, world_of


def save_model(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    stop_token_ids: Sequence[int] | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """As `model.save.save_model`, by the first process; the others return when the folder is there.

    weights: saved in the place of the model's own, in float32.
    """
    whole = whole_model(model, weights)
    if whole is not None:
        save.save_model(whole, tokenizer, folder, stop_token_ids=stop_token_ids)
    world_of(model).wait()
