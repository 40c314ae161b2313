"""Models from the hub, from Hugging Face folders and from GGUF files.

Responsible for: causal language models and scalar models (reward models, critics), complete or not at all,
with errors that say what to do. The loaded models have no dropout.
Not responsible for: tokenizers (text/tokenizer.py), adapters (lora.py), choosing a device (the caller).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from dovetail.errors import ModelError
from dovetail.model.copies import copy_of
from dovetail.model.deepspeed_chat import is_deepspeed_chat_reward, new_names
from dovetail.model.dropout import disable_dropout
from dovetail.model.finite import first_not_finite
from dovetail.model.forward import plain_model
from dovetail.model.generation_defaults import expect_readable, repaired
from dovetail.model.linear_logprobs import head_of
from dovetail.model.padding import num_rows
from dovetail.model.place import existing, gguf_in
from dovetail.model.probe import expect_no_noise, probe
from dovetail.model.quantised import as_plain, ask_for_plain_weights, leftover_scales
from dovetail.model.save import save_model
from dovetail.model.scalar import scalar_model_from, with_scalar_head
from dovetail.model.scalar_class import SCALAR, scalar_class_of
from dovetail.telemetry.log import warn
from dovetail.text.chat_format import ChatFormat, template_ids
from dovetail.text.hub_names import no_network_hint
from dovetail.text.quiet import quiet

__all__ = [
    "copy_of",
    "disable_dropout",
    "expect_rows_for",
    "load_causal_lm",
    "load_scalar_model",
    "read_config",
    "save_model",
    "scalar_model_from",
]

_OTHER_HEADS = ("ForTokenClassification", "ForQuestionAnswering", "ForMaskedLM", "ForMultipleChoice")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
"""The number of a layer in the name of a weight."""
_ONE_PLACE = "take config.json and the weights from one and the same place; save or download the model again"


def load_causal_lm(
    path: str | Path,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a causal language model by hub name, folder, .gguf file, or folder with exactly one .gguf file.

    Raises ModelError if it is not there, is of another kind, or lacks any weight.
    """
    name = existing(path, revision)
    model = _read_causal_lm(name, dtype, revision=revision, trust_remote_code=trust_remote_code)
    _make_ready(name, model, device)
    _expect_known_head(model)
    return model


def load_scalar_model(
    path: str | Path,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    seed: int,
    pad_token_id: int | None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a reward model or critic: a finished one with its head, or a language model plus a head drawn from `seed`.

    pad_token_id: the pad token for the config; None keeps that of a finished model.
    """
    name = existing(path, revision)
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    if gguf_in(name) is None and _has_scalar_head(name, config := _read_config(name, options)):
        scalar_class = scalar_class_of(config)
        if not _is_scalar(config):
            config.num_labels = 1
            with explained(name), torch.device("meta"):
                prefix = scalar_class.from_config(config).base_model_prefix
            options |= {"config": config, "key_mapping": new_names(prefix)}
        model = _read_weights(scalar_class, name, dtype, config, options)
        if model.config.num_labels != 1:
            raise ModelError(
                f"{name} gives {model.config.num_labels} numbers per text; a reward model gives one",
                hint="give a reward model, or a causal language model to start one from",
            )
        if pad_token_id is not None:
            model.config.get_text_config().pad_token_id = pad_token_id
    else:
        causal_lm = _read_causal_lm(name, dtype, **options)
        model = with_scalar_head(causal_lm, seed=seed, pad_token_id=pad_token_id)
    _make_ready(name, model, device)
    return model


def read_config(
    path: str | Path, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedConfig | None:
    """Read the configuration of a model, without its weights; None for a .gguf file, which has it among them."""
    name = existing(path, revision)
    if gguf_in(name) is not None:
        return None
    config: PreTrainedConfig = _read_config(
        name, {"revision": revision, "trust_remote_code": trust_remote_code}
    )
    return config


def expect_supported(
    path: str | Path, *, revision: str | None = None, trust_remote_code: bool = False
) -> None:
    """Raise ModelError for a model of a kind that is never supported; no weight is read."""
    config = read_config(path, revision=revision, trust_remote_code=trust_remote_code)
    if config is not None and not _has_scalar_head(str(path), config):
        expect_causal_lm(str(path), config)


def is_reward_model(
    path: str | Path, *, revision: str | None = None, trust_remote_code: bool = False
) -> bool:
    """Return whether it is a finished reward model: Dovetail's, another one for transformers, or DeepSpeed-Chat's."""
    config = read_config(path, revision=revision, trust_remote_code=trust_remote_code)
    return config is not None and _has_scalar_head(str(path), config)


def expect_reward_head(
    path: str | Path, *, revision: str | None = None, trust_remote_code: bool = False
) -> None:
    """Raise ModelError unless it is a finished reward model, whose scores mean something."""
    if not is_reward_model(path, revision=revision, trust_remote_code=trust_remote_code):
        raise ModelError(
            f"{path} is a language model without a reward head: its scores would be noise",
            hint="train stage 2 first (dovetail reward), or give a finished reward model",
        )


def expect_rows_for(tokenizer: PreTrainedTokenizerBase, model: Any, name: str) -> None:
    """Raise ModelError if the tokenizer makes tokens that the model's embedding has no row for.

    More rows than tokens are common: embeddings are rounded up. An added token without a row, such as one for
    padding or for images, does no harm until a text holds it; the end token and the template's are in every text.
    """
    used = sorted(template_ids(ChatFormat(tokenizer)))
    expect_rows(tokenizer, num_rows(plain_model(model)), name, used)


def expect_rows(tokenizer: PreTrainedTokenizerBase, rows: int, name: str, used: Sequence[int] = ()) -> None:
    """Raise as `expect_rows_for` does, for an embedding of `rows` rows; used: added ids that need a row, too."""
    optional = tokenizer.get_added_vocab().keys() - {tokenizer.bos_token, tokenizer.eos_token}
    ids = tokenizer.get_vocab()
    needed = {i: token for token, i in ids.items() if token not in optional or i in used}
    beyond = sorted((i, token) for i, token in needed.items() if i >= rows)
    if beyond:
        raise ModelError(
            f"the model's embedding of {name} has {rows} rows, and its tokenizer has ids beyond them: "
            f"{len(beyond)} in all, the first {beyond[0][0]}, {beyond[0][1]!r}",
            hint="take the tokenizer that belongs to the model, or make room in the model: "
            "model.resize_token_embeddings(len(tokenizer)), then save_pretrained",
        )


def _read_causal_lm(
    name: str, dtype: torch.dtype, *, revision: str | None, trust_remote_code: bool
) -> PreTrainedModel:
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    gguf = gguf_in(name)
    if gguf is not None:
        plain = {"gguf_file": gguf.name, "quantization_config": GgufConfig(dequantize=True)}
        model = as_plain(_complete(AutoModelForCausalLM, str(gguf.parent), dtype, plain), dtype)
    else:
        config = _read_config(name, options)
        expect_causal_lm(name, config)
        expect_readable(Path(name))
        model = _read_weights(AutoModelForCausalLM, name, dtype, config, options)
    if model.generation_config is not None:
        model.generation_config, change = repaired(model.generation_config)
        if change is not None:
            warn(f"the generation config of {name} could not be saved again: {change}")
    return model


def expect_causal_lm(name: str, config: Any) -> None:
    """Raise ModelError for models of another kind, and name the kind in usual words."""
    text_model = "give a model that writes text, such as HuggingFaceTB/SmolLM2-135M"
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{name} is a {config.model_type}: encoder-decoder models are not supported", hint=text_model
        )
    for architecture in config.architectures or ():
        if architecture.endswith((*_OTHER_HEADS, SCALAR)):
            raise ModelError(f"{name} is a {architecture}, not a causal language model", hint=text_model)
    is_known = type(config) in AutoModelForCausalLM._model_mapping or hasattr(config, "auto_map")
    for kind in ("vision", "audio"):
        if not is_known and getattr(config, f"{kind}_config", None) is not None:
            raise ModelError(
                f"{name} is a {config.model_type}: {kind} models are not supported", hint=text_model
            )


def _read_weights(
    auto_class: Any, name: str, dtype: torch.dtype, config: Any, options: dict[str, Any]
) -> PreTrainedModel:
    """Return a complete model; for a quantised checkpoint, one with plain weights."""
    with explained(name):
        is_quantised = ask_for_plain_weights(name, config)
    if not is_quantised:
        return _complete(auto_class, name, dtype, options)
    model = _complete(auto_class, name, dtype, {**options, "config": config})
    with explained(name):
        return as_plain(model, dtype)


def _make_ready(name: str, model: PreTrainedModel, device: torch.device | str) -> None:
    """Move the model to its device, without dropout, and find how it reads batches (probe.py).

    Raises ModelError if a weight is not a number, or if Dovetail cannot train or run the model.
    """
    disable_dropout(model)
    text_config = model.config.get_text_config()
    if getattr(text_config, "output_router_logits", False):
        # It asks each forward for a loss that Dovetail does not train on, and that needs a mask of transformers' form.
        text_config.output_router_logits = False
        warn(
            f"output_router_logits is switched off in the config of {name}: no load-balancing loss is trained"
        )
    model.to(torch.device(device))  # type: ignore[arg-type]
    if (weight := first_not_finite(model.named_parameters())) is not None:
        raise ModelError(
            f"{weight} of {name} holds a NaN or an infinity in {str(model.dtype).removeprefix('torch.')}",
            hint="the checkpoint is damaged or its training diverged: download it again or take an earlier one"
            + ("; fp16 holds no number beyond 65504, try bf16" if model.dtype == torch.float16 else ""),
        )
    probe(model)
    expect_no_noise(model)


def _complete(auto_class: Any, name: str, dtype: torch.dtype, options: dict[str, Any]) -> PreTrainedModel:
    """Call from_pretrained, and raise ModelError where transformers would fill in random weights."""
    with explained(name), quiet():
        model, report = auto_class.from_pretrained(
            name, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    # Saving would run what loading did backwards; without this it writes the format of the model's class.
    model._weight_conversions = None
    _expect_shapes_agree(name, report["mismatched_keys"])
    if missing := sorted(report["missing_keys"]):
        raise ModelError(
            f"{name} has no weights for {_listed(missing)}, which {type(model).__name__} needs",
            hint="the folder is incomplete or of another kind of model; save or download it again",
        )
    _expect_layers_agree(name, model, sorted(report["unexpected_keys"]))
    complete: PreTrainedModel = model
    return complete


def _expect_shapes_agree(name: str, mismatched: Iterable[tuple[str, Sequence[int], Sequence[int]]]) -> None:
    """Raise ModelError for weights of another shape than the config's: transformers would draw new ones."""
    for key, found, wanted in sorted(mismatched, key=lambda one: one[0]):
        raise ModelError(
            f"the config of {name} contradicts its weights: {key} is {_shape(found)}, "
            f"the config asks for {_shape(wanted)}",
            hint=_ONE_PLACE,
        )


def _expect_layers_agree(name: str, model: PreTrainedModel, unexpected: Sequence[str]) -> None:
    """Raise ModelError for layers that the config does not count: transformers would leave them out silently.

    Quantised weights that the config does not describe are refused, too; other unused weights give a warning.
    """
    kinds = {_NUMBER.sub("N", key) for key in model.state_dict()}
    if surplus := [key for key in unexpected if _NUMBER.sub("N", key) in kinds]:
        raise ModelError(
            f"the config of {name} contradicts its weights: it has no place for {_listed(surplus)}",
            hint=_ONE_PLACE,
        )
    if scales := leftover_scales(model, unexpected):
        raise ModelError(
            f"{name} holds quantised weights, with {_listed(scales)}, and its config does not say how to read them",
            hint=f"config.json needs its quantization_config; {_ONE_PLACE}",
        )
    if unexpected:
        warn(f"{type(model).__name__} does not use these weights of {name}: {_listed(unexpected)}")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _shape(sizes: Sequence[int]) -> str:
    return " x ".join(str(size) for size in sizes)


def _read_config(name: str, options: dict[str, Any]) -> Any:
    with explained(name), quiet():
        return AutoConfig.from_pretrained(name, **options)


def _is_scalar(config: Any) -> bool:
    return any(architecture.endswith(SCALAR) for architecture in config.architectures or ())


def _has_scalar_head(name: str, config: Any) -> bool:
    return _is_scalar(config) or is_deepspeed_chat_reward(Path(name).expanduser())


@contextmanager
def explained(name: str) -> Iterator[None]:
    """Turn what transformers and peft raise into a ModelError that names the model and what to do."""
    try:
        yield
    except (ModelError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a dozen kinds, from OSError to AssertionError; all mean the same to the user
        first, _, rest = str(error).strip().partition("\n")
        text = f"{first} {rest.partition(chr(10))[0]}" if first.endswith(":") else first
        reason = " ".join(text.split()) or type(error).__name__
        if Path(name).exists():
            hint = "it is damaged, incomplete, or of a kind that this version of transformers cannot read"
            if "trust_remote_code" in str(error):
                hint = "it ships its own code: set trust_remote_code if you trust its source"
        else:
            hint = f"check the network, or {no_network_hint(name)}; gated models need `hf auth login`"
        raise ModelError(f"{name} cannot be loaded: {reason}", hint=hint) from error


def _expect_known_head(model: Any) -> None:
    """Refuse a class whose head does more than we know of: its log-probabilities would be silently wrong."""
    head = head_of(model)
    ids = torch.arange(2, device=head.weight_VD.device)[None]
    with torch.no_grad():
        theirs = model(input_ids=ids, use_cache=False).logits[0].double()
        ours = head.logits(model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]).double()
    # Half precision rounds their logits; an unknown factor, cap or bias is far more than that.
    if not torch.allclose(ours, theirs, rtol=0.05, atol=0.05 * float(theirs.abs().max())):
        raise ModelError(
            f"the head of {type(model).__name__} does more to its logits than dovetail knows",
            hint="take another architecture, or report this one",
        )
