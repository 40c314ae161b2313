"""The heads and widths of a decoder, whatever its configuration calls them.

Responsible for: reading them off a Hugging Face configuration, without a model.
Not responsible for: what follows from them (training/step_memory.py, parallel/tensor_plan.py).
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Widths:
    """The widths of the parts of each layer."""

    hidden: int
    """D, the width of the hidden states."""
    num_heads: int
    num_key_heads: int
    """The heads of keys and values; fewer than `num_heads` where queries share them."""
    head: int
    inner: int
    """F, the inner width of the feed-forward layer."""


def widths_of(config: Any) -> Widths:
    """Return the widths in any Hugging Face decoder's configuration."""
    config = config.get_text_config()
    hidden, num_heads = int(config.hidden_size), int(config.num_attention_heads)
    # OPT, GPT-2 and the others each have their own word for it; where it is None, it is four times the width.
    inner = next(
        (
            found
            for key in ("intermediate_size", "ffn_dim", "n_inner")
            if (found := getattr(config, key, None))
        ),
        4 * hidden,
    )
    return Widths(
        hidden=hidden,
        num_heads=num_heads,
        num_key_heads=int(getattr(config, "num_key_value_heads", None) or num_heads),
        head=int(getattr(config, "head_dim", None) or hidden // num_heads),
        inner=int(inner),
    )
