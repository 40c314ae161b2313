"""What a folder is, before its files are read as a model."""

from pathlib import Path

import pytest
import torch

from dovetail.errors import ModelError
from dovetail.model.load import load_causal_lm
from dovetail.model.save import save_model
from dovetail.text import tokenizer as tokenizer_module
from dovetail.text.tokenizer import load_tokenizer
from tests.fakes import byte_tokenizer, tiny_model

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 12345\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_model(tiny_model(), byte_tokenizer(), tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json", "model.gguf"])
def test_a_file_that_was_never_downloaded_is_named(folder: Path, name: str) -> None:
    (folder / name).write_text(POINTER)
    for read in (
        lambda: load_causal_lm(folder, dtype=torch.float32, device="cpu"),
        lambda: load_tokenizer(folder),
    ):
        with pytest.raises(ModelError, match=f"{name} is a git-lfs pointer, not the file itself") as caught:
            read()
        assert "git lfs pull" in str(caught.value.hint)


def test_a_single_gguf_file_that_was_never_downloaded_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_text(POINTER)
    with pytest.raises(ModelError, match=r"a\.gguf is a git-lfs pointer"):
        load_causal_lm(tmp_path / "a.gguf", dtype=torch.float32, device="cpu")
    with pytest.raises(ModelError, match=r"a\.gguf is a git-lfs pointer"):
        load_tokenizer(tmp_path / "a.gguf")


@pytest.mark.parametrize("name", ["tokenizer.model", "spiece.model", "sentencepiece.bpe.model"])
def test_a_sentencepiece_vocabulary_asks_for_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(tokenizer_module, "find_spec", lambda _: None)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / name).write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    with pytest.raises(ModelError, match=f"{name} needs the package sentencepiece") as caught:
        load_tokenizer(tmp_path)
    assert caught.value.hint == "pip install sentencepiece"


def test_a_vocabulary_of_another_kind_does_not_ask_for_sentencepiece(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")
    with pytest.raises(ModelError) as caught:
        load_tokenizer(tmp_path)
    assert "sentencepiece" not in str(caught.value.hint)
