"""Finished models of a stage, written once however many processes hold them.

Responsible for: gathering a model for its folder, and trying to write the folder before the stage begins.
Not responsible for: the folder's contents (model/save.py).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dovetail.model import save
from dovetail.parallel.shard import sharding_of


def save_model(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    stop_token_ids: Sequence[int] | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Save the model as `model.save.save_model` does, in the first process; the others wait for the folder.

    weights: saved in the place of the model's own, in float32.
    """
    sharded = sharding_of(model)
    whole = sharded.for_saving(weights)
    if whole is not None:
        save.save_model(whole, tokenizer, folder, stop_token_ids=stop_token_ids)
    sharded.world.wait()


def expect_savable(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    stop_token_ids: Sequence[int] | None = None,
) -> None:
    """Try to write all of a stage's folder but the weights before its first step; raise CheckpointError if it fails."""
    sharded = sharding_of(model)
    if sharded.world.is_first:
        save.expect_savable(sharded.generation_model, tokenizer, folder, stop_token_ids=stop_token_ids)
