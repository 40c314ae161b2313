"""List parameters of OpenAI's API and of other servers that this server lacks, with the values that ask for nothing.

Responsible for: accepting a parameter whose value asks for nothing (`tools: []`, `store: false`), because clients often
send it, and refusing one that asks for something. Not responsible for: the supported parameters (protocol.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator

_NOTHING: tuple[Any, ...] = (None, [], {})
"""Values that ask for nothing, whichever parameter has them."""

SAMPLING: Mapping[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "ignore_eos": (False,),
    "min_tokens": (0,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "return_tokens_as_token_ids": (False,),
    "priority": (0,),
}
"""Parameters of both chat and text completions."""

CHAT: Mapping[str, tuple[Any, ...]] = {
    **SAMPLING,
    "tool_choice": ("none", "auto"),  # without tools there is nothing to choose
    "function_call": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "store": (False,),
    "service_tier": ("auto", "default"),
    "modalities": (["text"],),
    "verbosity": ("medium",),
    "echo": (False,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "add_special_tokens": (False,),
}
TEXT: Mapping[str, tuple[Any, ...]] = {**SAMPLING, "suffix": ("",), "add_special_tokens": (True,)}
STREAM_OPTIONS: Mapping[str, tuple[Any, ...]] = {
    "continuous_usage_stats": (False,),
    "include_obfuscation": (False,),
}


def _describe(schema: dict[str, Any], model: type[Request]) -> None:
    """Add the values that are accepted beyond the fields to the JSON schema."""
    schema["additionalProperties"] = {"enum": [*_NOTHING]}
    properties = schema.setdefault("properties", {})
    for name, values in model.neutral.items():
        properties[name] = {"enum": [*_NOTHING, *values]}


class Request(BaseModel):
    """A JSON object from a client: unknown fields are errors unless their value asks for nothing."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, json_schema_extra=_describe)
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    """A map from each field that this server lacks to its values that ask for nothing, besides null and empty ones."""

    @model_validator(mode="before")
    @classmethod
    def _without_what_asks_for_nothing(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        return {
            name: value
            for name, value in given.items()
            if name in cls.model_fields or not cls._asks_for_nothing(name, value)
        }

    @classmethod
    def _asks_for_nothing(cls, name: str, value: Any) -> bool:
        # In Python 1 == True, but a boolean and a number are different values here.
        return any(
            value == nothing and isinstance(value, bool) == isinstance(nothing, bool)
            for nothing in (*_NOTHING, *cls.neutral.get(name, ()))
        )
