"""Load a tokenizer by hub name, folder or GGUF file.

Responsible for: finding it, giving it the chat template the user asked for, and errors that say what to do.
Not responsible for: the tokens of a conversation (chat_format.py).
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import cast

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.integrations.gguf import read_gguf_metadata

from dovetail.errors import ModelError
from dovetail.text.hub_names import expect_available, no_network_hint
from dovetail.text.model_folder import adapter_in, expect_downloaded, has_vocabulary
from dovetail.text.quiet import quiet
from dovetail.text.template import note_model_ends
from dovetail.text_file import read_text


def load_tokenizer(
    path: str | Path,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    chat_template: str | None = None,
) -> PreTrainedTokenizerBase:
    """Load the tokenizer at `path`: a hub name, a Hugging Face folder, a .gguf file, or a folder with one such file.

    It also knows the tokens that end answers as the model there declares them; see template.py. An adapter without
    a vocabulary gets that of its base, with the adapter's chat template if it has one.

    chat_template: a Jinja template, or a file with one, that takes the place of the tokenizer's own.
    """
    place = Path(path).expanduser()
    is_path = str(path).endswith(".gguf")
    expect_available(str(path), kind="model", error=ModelError, is_path=is_path, revision=revision)
    if place.exists():
        expect_downloaded(place)
    adapter = adapter_in(place)
    if adapter is not None and not has_vocabulary(place):
        own = place / "chat_template.jinja"
        return load_tokenizer(
            adapter.base,
            revision=adapter.revision,
            trust_remote_code=trust_remote_code,
            chat_template=chat_template or (str(own) if own.is_file() else None),
        )
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    gguf = gguf_file(place)
    try:
        with quiet():
            if gguf is not None:
                tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name, **options)
                _set_special_tokens(tokenizer, gguf)
            else:
                name = str(place) if place.exists() else str(path)
                tokenizer = AutoTokenizer.from_pretrained(name, **options)
                if adapter is None:
                    note_model_ends(tokenizer, name, revision)
                else:
                    note_model_ends(tokenizer, adapter.base, adapter.revision)
        _expect_vocabulary(tokenizer)
    except Exception as error:  # a dozen kinds, from OSError to ImportError; all mean the same to the user
        raise _cannot_load(str(path), place, error) from error
    if chat_template is not None:
        tokenizer.chat_template = read_template(chat_template)
    return cast(PreTrainedTokenizerBase, tokenizer)


def gguf_file(place: Path) -> Path | None:
    """Return the GGUF file that `place` is or holds; None for an ordinary Hugging Face folder or a hub name."""
    if place.suffix == ".gguf":
        return place
    if not place.is_dir() or any(
        (place / name).exists() for name in ("tokenizer_config.json", "tokenizer.json")
    ):
        return None
    return only_gguf_in(place)


def only_gguf_in(folder: Path) -> Path | None:
    """Return the GGUF file of a folder, None if it has none; raise ModelError if it has several."""
    found = sorted(folder.glob("*.gguf"))
    if len(found) > 1:
        raise ModelError(
            f"{folder} holds {len(found)} GGUF files: {', '.join(file.name for file in found)}",
            hint=f"name the one to load, such as {found[0]}",
        )
    return found[0] if found else None


def _set_special_tokens(tokenizer: PreTrainedTokenizerBase, gguf: Path) -> None:
    """Set first and end token as in the file: transformers 5.17 makes the first one of llama files the end too."""
    metadata, _ = read_gguf_metadata(str(gguf))
    for name in ("bos_token", "eos_token"):
        token_id = metadata.get(f"tokenizer.ggml.{name}_id")
        if token_id is not None:
            setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(int(token_id)))


def read_template(template: str) -> str:
    """Return the template: the content of the file if `template` names one, else the text as given."""
    if "{" in template:
        return template
    try:
        return read_text(Path(template).expanduser())
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(
            f"chat_template = {template!r} is neither a Jinja template nor a readable file: {error}",
            hint="give a template with {{ ... }} in it, or the path of a .jinja file in UTF-8",
        ) from error


def _cannot_load(given: str, place: Path, error: Exception) -> ModelError:
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    sentencepiece = next(place.glob("*.model"), None) if place.is_dir() else None
    if sentencepiece is not None and find_spec("sentencepiece") is None and _is_protobuf(sentencepiece):
        return ModelError(
            f"the tokenizer of {given} cannot be loaded: {sentencepiece.name} needs the package sentencepiece, which "
            "is not installed",
            hint="pip install sentencepiece",
        )
    if place.is_dir():
        hint = (
            "the folder needs tokenizer.json (or the model's own tokenizer files) and tokenizer_config.json; "
            "save them with tokenizer.save_pretrained(folder)"
        )
    elif place.is_file():
        hint = "give a Hugging Face folder or a .gguf file that is whole; download it again if it was cut off"
    else:
        hint = (
            f"check the network, or {no_network_hint(given)}; for a gated model, log in with `hf auth login`"
        )
    return ModelError(f"the tokenizer of {given} cannot be loaded: {reason}", hint=hint)


def _expect_vocabulary(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ValueError for the empty tokenizer that transformers makes where it finds no vocabulary."""
    if not set(tokenizer("hello")["input_ids"]) - set(tokenizer.all_special_ids):
        raise ValueError("it has no vocabulary: a plain word gives no token")


def _is_protobuf(file: Path) -> bool:
    """Return whether a vocabulary is sentencepiece's, whose first field has this tag; other .model files are text."""
    with file.open("rb") as content:
        return content.read(1) == b"\n"
