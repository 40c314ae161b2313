"""Read the shape of a model from its name or configuration: what its memory, its work and its adapters depend on.

Responsible for: the shapes that come with the package (shapes.yaml), config.json files, and counts of weights.
Not responsible for: weights, bytes (memory.py), seconds (time.py).

Letters: D width of the hidden states, Q of all query heads, K of all key heads, F of the feed-forward layer, V
vocabulary, E width of the embedding.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from dovetail.errors import ConfigError
from dovetail.text_file import read_text

CATALOGUE = Path(__file__).with_name("shapes.yaml")


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """The numbers that the activations of a decoder depend on."""

    num_layers: int
    width: int
    """D."""
    query_width: int
    """Q: heads times head width."""
    key_width: int
    """K: key heads times head width."""
    inner_width: int
    """F."""
    vocabulary: int
    """V of the language-model head; 0 if there is none (reward models, critics)."""
    inner_copies: int
    """The numbers that the feed-forward layer keeps for each of its F (`inner_copies`)."""
    has_rms_norms: bool
    """transformers' RMSNorms compute in float32 and keep that copy."""
    num_norms: int = 2
    """The norms of a layer's hidden states."""
    norms_heads: bool = False
    """True if queries and keys have norms of their own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A model as its configuration describes it."""

    name: str
    model_type: str
    architecture: Architecture
    embedding: int
    """The weights before the first layer."""
    layer: int
    """The weights of one layer."""
    ending: int
    """The weights behind the last layer but for the head."""
    head: int
    """The weights of an untied head; 0 where the embedding serves."""
    head_width: int
    """E: the width that the head reads."""
    linears: tuple[tuple[int, int], ...]
    """(inputs, outputs) of the linear modules of one layer, which adapters go on."""
    outer_linears: tuple[tuple[int, int], ...] = ()
    """Those outside the layers."""
    context: int | None = None
    """The most tokens of a sequence."""

    @property
    def num_weights(self) -> int:
        """The weights of the language model."""
        return self.embedding + self.architecture.num_layers * self.layer + self.ending + self.head

    @property
    def num_scalar_weights(self) -> int:
        """The weights of a reward model or critic of this shape: a scalar head in place of the vocabulary's."""
        return self.num_weights - self.head + self.head_width

    def num_adapter_weights(self, rank: int) -> int:
        """Count the weights of adapters of a rank on all linear modules."""
        layers = self.architecture.num_layers * sum(map(sum, self.linears))
        return rank * (layers + sum(map(sum, self.outer_linears)))

    @property
    def layer_products(self) -> int:
        """The weights of all layers that a token is multiplied with."""
        inside = sum(a * b for a, b in self.linears)
        return self.architecture.num_layers * inside + sum(a * b for a, b in self.outer_linears)

    @property
    def head_products(self) -> int:
        """The weights of the head that a scored token is multiplied with."""
        return self.architecture.vocabulary * self.head_width


def shape_of(model: str) -> Shape:
    """Return the shape of a model: a folder with a config.json, such a file, or a name of the catalogue.

    Raises ConfigError for what is neither, and for a configuration of an unknown family.
    """
    place = Path(model).expanduser()
    file = place / "config.json" if place.is_dir() else place
    if place.is_dir() or place.suffix == ".json":
        return shape_from_config(_read(file), model, where=str(file))
    name = catalogue_name(model)
    if name is None:
        close = difflib.get_close_matches(_plain(model), catalogue(), n=3)
        raise ConfigError(
            f"{model}: no such folder or config.json, and no model of this name has its shape in Dovetail",
            hint=f"{f'did you mean {close[0]}? ' if close else ''}give the folder or the config.json of the model, or "
            "the name of one that is known: `dovetail plan --models` lists them",
        )
    return shape_from_config(catalogue()[name], name, where=f"{CATALOGUE.name}: {name}")


@cache
def catalogue() -> dict[str, dict[str, Any]]:
    """Return the configurations that come with the package, by name."""
    found: dict[str, dict[str, Any]] = yaml.safe_load(CATALOGUE.read_text(encoding="utf-8"))
    return found


def catalogue_name(model: str) -> str | None:
    """Return the catalogue's name for a hub's name: the longest that it begins with, up to a hyphen."""
    plain = _plain(model)
    known = [name for name in catalogue() if plain == name or plain.startswith(f"{name}-")]
    return max(known, key=len, default=None)


def _plain(model: str) -> str:
    return model.rstrip("/").rpartition("/")[2].lower().removeprefix("meta-")


def _read(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(read_text(file))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{file}: cannot be read as JSON: {error}", hint="give a model's config.json"
        ) from error
    if not isinstance(config, dict):
        raise ConfigError(
            f"{file}: holds {type(config).__name__}, not an object", hint="give a model's config.json"
        )
    return config


class _Fields:
    """The fields of a configuration, under the names of any family."""

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self.config = config
        self.where = where

    def number(self, *names: str, default: int | None = None) -> int:
        """Return the first of these fields that is set. Raises ConfigError if none is, or if it is no whole number."""
        for name in names:
            value = self.config.get(name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(
                    f"{self.where}: {name} = {value!r} is not a number of 1 or more",
                    hint="repair the config.json",
                )
            return value
        if default is None:
            raise ConfigError(
                f"{self.where}: has no {names[0]}",
                hint="give a model's complete config.json, as it was published",
            )
        return default

    def flag(self, name: str, *, default: bool) -> bool:
        """Return a field that is true or false."""
        value = self.config.get(name)
        return default if value is None else bool(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Family:
    """The parts in which the layers of a family differ."""

    is_gated: bool = True
    has_rms_norms: bool = True
    num_norms: int = 2
    norms_heads: bool = False
    qkv_bias: bool = False
    other_bias: bool = False
    """True if the other linear modules have biases."""
    fused: tuple[str, ...] = ()
    """The projections that one module computes: qkv, gate_up."""
    is_tied: bool = False
    defaults: Mapping[str, int] | None = None
    """Fields that published files leave to transformers' defaults."""


FAMILIES: dict[str, _Family] = {
    "opt": _Family(is_gated=False, has_rms_norms=False, qkv_bias=True, other_bias=True, is_tied=True),
    "gpt2": _Family(
        is_gated=False, has_rms_norms=False, qkv_bias=True, other_bias=True, fused=("qkv",), is_tied=True
    ),
    "gpt_neox": _Family(is_gated=False, has_rms_norms=False, qkv_bias=True, other_bias=True, fused=("qkv",)),
    "llama": _Family(),
    "mistral": _Family(),
    "qwen2": _Family(qkv_bias=True),
    "qwen3": _Family(norms_heads=True, defaults={"head_dim": 128}),
    "gemma2": _Family(num_norms=4, is_tied=True, defaults={"head_dim": 256}),
    "gemma3_text": _Family(
        num_norms=4,
        norms_heads=True,
        is_tied=True,
        defaults={"head_dim": 256, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 262208},
    ),
    "phi3": _Family(fused=("qkv", "gate_up")),
}
"""The families, by the `model_type` of a configuration."""


def shape_from_config(config: Mapping[str, Any], name: str, *, where: str) -> Shape:
    """Return the shape that a config.json describes; `where` stands in messages."""
    text = config.get("text_config") or config
    model_type = str(text.get("model_type") or config.get("model_type"))
    family = FAMILIES.get(model_type)
    if family is None:
        raise ConfigError(
            f"{where}: model_type = {model_type}, whose layers the planner does not know",
            hint=f"it knows {', '.join(FAMILIES)}",
        )
    fields = _Fields({**(family.defaults or {}), **text}, where)
    return _shape(fields, family, name, model_type)


def _shape(fields: _Fields, family: _Family, name: str, model_type: str) -> Shape:
    width = fields.number("hidden_size", "n_embd")
    heads = fields.number("num_attention_heads", "n_head")
    head_dim = fields.number("head_dim", default=width // heads)
    architecture = Architecture(
        num_layers=fields.number("num_hidden_layers", "n_layer"),
        width=width,
        query_width=heads * head_dim,
        key_width=fields.number("num_key_value_heads", default=heads) * head_dim,
        inner_width=fields.number("intermediate_size", "ffn_dim", "n_inner", default=4 * width),
        vocabulary=fields.number("vocab_size"),
        inner_copies=inner_copies(_function(fields, model_type), is_gated=family.is_gated),
        has_rms_norms=family.has_rms_norms,
        num_norms=family.num_norms,
        norms_heads=family.norms_heads,
    )
    linears = _linears(architecture, family)
    norm = width if family.has_rms_norms else 2 * width
    layer = sum(a * b for a, b in linears) + family.num_norms * norm + _biases(fields, family, architecture)
    layer += 2 * head_dim if family.norms_heads else 0
    embedding, ending, embedded, outer = _ends(fields, architecture, model_type, norm)
    is_tied = fields.flag("tie_word_embeddings", default=family.is_tied)
    return Shape(
        name=name,
        model_type=model_type,
        architecture=architecture,
        embedding=embedding,
        layer=layer,
        ending=ending,
        head=0 if is_tied else architecture.vocabulary * embedded,
        head_width=embedded,
        linears=linears,
        outer_linears=outer,
        context=fields.number("max_position_embeddings", "n_positions", default=2048),
    )


def _function(fields: _Fields, model_type: str) -> str:
    """Return the function of the feed-forward layers."""
    named = fields.config.get("activation_function") or fields.config.get("hidden_act")
    return str(named or {"opt": "relu", "gpt2": "gelu_new"}.get(model_type, "gelu"))


def inner_copies(function: str | None, *, is_gated: bool) -> int:
    """Return how many numbers a feed-forward layer keeps for each of its F.

    4 where it multiplies two projections (SwiGLU and its like); else 2, before and after the function, 1 where that is
    ReLU, which needs its result alone, and 5 where it is GELU written out term by term.
    """
    return 4 if is_gated else {"relu": 1, "gelu_new": 5}.get(function or "", 2)


def _linears(of: Architecture, family: _Family) -> tuple[tuple[int, int], ...]:
    """Return (inputs, outputs) of the linear modules of a layer."""
    d, q, k, f = of.width, of.query_width, of.key_width, of.inner_width
    inputs = [(d, q + 2 * k)] if "qkv" in family.fused else [(d, q), (d, k), (d, k)]
    if not family.is_gated:
        return (*inputs, (q, d), (d, f), (f, d))
    gates = [(d, 2 * f)] if "gate_up" in family.fused else [(d, f), (d, f)]
    return (*inputs, (q, d), *gates, (f, d))


def _biases(fields: _Fields, family: _Family, of: Architecture) -> int:
    """Count the biases of a layer's linear modules."""
    attends = fields.flag("attention_bias", default=False) and family.has_rms_norms
    has_any = fields.flag("enable_bias", default=True)
    total = of.query_width + 2 * of.key_width if (family.qkv_bias and has_any) or attends else 0
    total += of.width if (family.other_bias and has_any) or attends else 0
    if family.other_bias and has_any:
        total += of.inner_width + of.width
    elif fields.flag("mlp_bias", default=False):
        total += 2 * of.inner_width + of.width
    return total


def _ends(
    fields: _Fields, of: Architecture, model_type: str, norm: int
) -> tuple[int, int, int, tuple[tuple[int, int], ...]]:
    """Return the weights before and behind the layers, the width of the embedding, and linear modules outside."""
    if model_type != "opt":
        positions = fields.number("n_positions", default=1024) if model_type == "gpt2" else 0
        return (of.vocabulary + positions) * of.width, norm, of.width, ()
    embedded = fields.number("word_embed_proj_dim", default=of.width)
    positions = fields.number("max_position_embeddings", default=2048) + 2
    outer = ((embedded, of.width), (of.width, embedded)) if embedded != of.width else ()
    has_norm = fields.flag("do_layer_norm_before", default=True) and not fields.flag(
        "_remove_final_layer_norm", default=False
    )
    embedding = of.vocabulary * embedded + positions * of.width + (embedded * of.width if outer else 0)
    return embedding, (norm if has_norm else 0) + (embedded * of.width if outer else 0), embedded, outer
