"""The base of every configuration value: frozen, and strict about its keys.

Responsible for: what all configuration models share. No module of this folder imports torch.
"""

from typing import ClassVar

from pydantic import BaseModel, ConfigDict


class FrozenModel(BaseModel):
    """Immutable; unknown keys and numbers without end are errors; the docstring under a field is its description."""

    advanced: ClassVar[frozenset[str]] = frozenset()
    """The names of settings for experts, which the page of settings lists apart."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        validate_default=True,
    )
