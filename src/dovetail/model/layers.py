"""The decoder layers of a model, and the first few of them that show every kind.

Responsible for: finding the layers, and running a model without the rest for a while.
Not responsible for: what is done with them (plain_forward.py, probe.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel

_FEWEST = 2


def layer_list(model: PreTrainedModel) -> tuple[str, nn.ModuleList] | None:
    """Return the name and the list of the decoder layers, in order; None if no list is as long as the config says."""
    num_layers = model.config.get_text_config().num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            return name, module
    return None


@contextmanager
def few_layers(model: PreTrainedModel, run: Callable[[], object]) -> Iterator[None]:
    """Give the model only its first layers within the block, up to one of each kind, unless `run` fails without all."""
    found = layer_list(model)
    if found is None:
        yield
        return
    name, layers = found
    path, _, attribute = name.rpartition(".")
    parent = model.get_submodule(path)
    kinds = [_kind(layer) for layer in layers]
    last = max(kinds.index(kind) for kind in kinds)
    setattr(parent, attribute, nn.ModuleList(list(layers)[: max(_FEWEST, last + 1)]))
    try:
        run()
    except Exception:  # any class may count its layers in its own way
        setattr(parent, attribute, layers)
    try:
        yield
    finally:
        setattr(parent, attribute, layers)


def _kind(layer: nn.Module) -> tuple[Any, ...]:
    """Return what distinguishes a layer: its modules, and the plain values that they hold except its number."""
    return tuple(
        (name, type(module).__name__, key, value)
        for name, module in layer.named_modules()
        for key, value in [("", None), *sorted(vars(module).items())]
        if key != "layer_idx" and (value is None or type(value) in (bool, int, float, str))
    )
