"""Read written model folders again and compare them with the model in memory.

Responsible for: comparing names, shapes and values of the weights, the output for a few tokens, and the tokenizer, of a
folder that was just written.
Not responsible for: writing folders (save.py), loading models to use them (load.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dovetail.errors import CheckpointError
from dovetail.model.sample_output import LARGEST_GAP, relative_gap, sample_output

_PROBE_TEXT = "Héllo, what is 12 x 7?\n  84 你好"


def expect_same_weights(folder: Path, model: PreTrainedModel, state: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError unless the folder gives a model with these weights and the output of `model`.

    state: the weights as they were to be written.
    """
    model_class: Any = type(model)
    loaded, report = model_class.from_pretrained(folder, dtype="auto", output_loading_info=True)
    found = loaded.state_dict()
    if absent := sorted({*report["missing_keys"], *(state.keys() - found.keys())}):
        raise _differs(folder, f"{absent[0]} is not there")
    if surplus := sorted({*report["unexpected_keys"], *(found.keys() - state.keys())}):
        raise _differs(folder, f"{surplus[0]} is not a weight of the model")
    for name, weight in state.items():
        if weight.shape != found[name].shape:
            raise _differs(folder, f"{name} is {list(found[name].shape)}, and {list(weight.shape)} in memory")
        if not torch.equal(weight.to("cpu", found[name].dtype), found[name]):
            raise _differs(folder, f"{name} has other values than in memory")
    gap = relative_gap(sample_output(model), sample_output(loaded))
    if not gap <= LARGEST_GAP:
        raise _differs(folder, f"its output is {100 * gap:.1f} % away from that of the model in memory")


def expect_same_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise CheckpointError unless the folder gives a tokenizer with the same ids, end token and chat template."""
    loaded = type(tokenizer).from_pretrained(folder)
    for what, ours, theirs in (
        ("the ids of a text", tokenizer(_PROBE_TEXT)["input_ids"], loaded(_PROBE_TEXT)["input_ids"]),
        ("the vocabulary", tokenizer.get_vocab(), loaded.get_vocab()),
        ("the end token", tokenizer.eos_token_id, loaded.eos_token_id),
        ("the chat template", tokenizer.chat_template, loaded.chat_template),
    ):
        if ours != theirs:
            raise CheckpointError(
                f"{folder}: the tokenizer that was written is not the one in memory: {what} differs",
                hint="save the tokenizer with tokenizer.save_pretrained and see whether it loads again as it was",
            )


def _differs(folder: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{folder} was written, and read again it is not the model in memory: {what}",
        hint="the folder was not kept; checkpoints are unharmed. Check the disk, and the versions of transformers "
        "and safetensors",
    )
