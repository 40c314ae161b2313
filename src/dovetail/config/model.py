"""The settings of a model: its place, its precision, its adapter.

Responsible for: the settings of one model. Not responsible for: loading it (model/load.py).
"""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, PositiveInt

from dovetail.config.frozen import FrozenModel

Precision = Literal["auto", "bf16", "fp16", "fp32"]


class LoraConfig(FrozenModel):
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685) on the linear layers, through peft."""

    advanced: ClassVar[frozenset[str]] = frozenset({"dropout", "target_modules"})

    rank: PositiveInt = 64
    """Rank r of each adapter. 16 to 128; DeepSpeed-Chat's recipes use 128."""
    alpha: Annotated[float, Field(gt=0)] = 64.0
    """Scale: the adapter's output is multiplied by alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability of dropping an adapter input during supervised fine-tuning; always 0 in PPO."""
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Names of the linear layers that get an adapter, or all of them except the head."""


class ModelConfig(FrozenModel):
    """One pretrained model and how it is adapted."""

    advanced: ClassVar[frozenset[str]] = frozenset({"revision", "trust_remote_code"})

    path: str
    """Hub name (facebook/opt-1.3b), a local Hugging Face folder, or a .gguf file."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    trust_remote_code: bool = False
    """Run model code that the repository ships. Only for sources you trust."""
    chat_template: str | None = None
    """Jinja chat template, or a file with one; by default the tokenizer's own, else Human/Assistant."""
    lora: LoraConfig | None = None
    """Train adapters instead of all weights."""
