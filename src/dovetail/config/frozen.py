"""The base of every configuration value: frozen, and strict about its keys.

Responsible for: what all configuration models share. No module of this folder imports torch.
"""

from pydantic import BaseModel, ConfigDict


class FrozenModel(BaseModel):
    """Immutable; unknown keys and numbers without end are errors; the docstring under a field is its description."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        validate_default=True,
    )
