"""Adapt a model's own modules to layers that are narrower than the configuration says.

Responsible for: counts of heads and widths that Hugging Face's modules keep beside their weights, and an embedding that
has some of its rows.
Not responsible for: the weights (tensor_plan.py), what is sent (tensor.py to generate, tensor_training.py to train).
"""

from collections.abc import Callable, Mapping

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dovetail.model.widths import widths_of
from dovetail.parallel.tensor_plan import Partition, Place


def expect_narrower_output(model: PreTrainedModel, partitions: Mapping[str, Partition]) -> None:
    """Tell GPT-2's layers, which compute with their output width, the new one."""
    for path, layer in model.named_modules():
        if isinstance(layer, Conv1D) and f"{path}.bias" in partitions:
            layer.nf = partitions[f"{path}.bias"].length


def count_fewer_heads(model: PreTrainedModel, place: Place) -> None:
    """Set the head counts that attention modules, and the configuration that some read, compute with."""
    config, widths = model.config, widths_of(model.config)
    heads, key_heads = place.heads(widths)
    known = {
        "num_heads": heads,
        "num_key_value_heads": key_heads,
        "num_key_value_groups": heads // key_heads,
        "split_size": heads * widths.head,
    }
    for module in model.modules():
        for name in known.keys() & vars(module).keys():
            setattr(module, name, known[name])
    config.head_dim = widths.head  # it may have followed from the number of heads
    config.num_attention_heads = heads
    if hasattr(config, "num_key_value_heads"):
        config.num_key_value_heads = key_heads


def look_up(
    embedding: nn.Embedding, first: int, rows: int, add_up: Callable[[Tensor], Tensor], ids: Tensor
) -> Tensor:
    """Embed token ids [...] as [..., D]: each rank looks up its rows, from `first` on, and `add_up` joins them."""
    is_here = (ids >= first) & (ids < first + rows)
    found: Tensor = type(embedding).forward(embedding, (ids - first).clamp(0, max(0, rows - 1)))
    return add_up(found.masked_fill(~is_here[..., None], 0))
