from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dovetail.demo.dataset import Sizes, dataset
from dovetail.demo.learner import new_model, small_llama
from dovetail.demo.tokenizer import SPECIAL_TOKENS, train_tokenizer

CONVERSATION = [
    {"role": "user", "content": "My cup is red."},
    {"role": "assistant", "content": "Good to know."},
    {"role": "user", "content": "What colour is it?"},
]


@pytest.fixture(scope="module")
def texts() -> tuple[str, ...]:
    return dataset(0, Sizes(documents=400, demonstrations=1, reward_prompts=1, ppo_prompts=1)).documents


@pytest.fixture(scope="module")
def tokenizer(texts: tuple[str, ...]) -> PreTrainedTokenizerFast:
    return train_tokenizer(texts, 900)


def test_special_tokens_have_the_first_ids_and_their_roles(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == [0, 1, 2, 3]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (0, 3, None)
    assert len(tokenizer) <= 900


def test_any_text_survives_encoding(tokenizer: PreTrainedTokenizerFast, texts: tuple[str, ...]) -> None:
    for text in (*texts[:20], "naïve café, 你好!", "two  spaces\nand a line"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_common_word_is_one_token_wherever_it_stands(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer.encode("colour")) == 1
    assert tokenizer.encode("What colour")[-1:] == tokenizer.encode("colour")


def test_the_template_marks_roles_and_ends_every_turn(tokenizer: PreTrainedTokenizerFast) -> None:
    text = tokenizer.apply_chat_template(CONVERSATION, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|user|>My cup is red.<|end|><|assistant|>Good to know.<|end|>"
        "<|user|>What colour is it?<|end|><|assistant|>"
    )
    ids = tokenizer.encode(text)
    by_hand = []
    for role, message in zip((1, 2, 1), CONVERSATION, strict=True):
        by_hand += [role, *tokenizer.encode(message["content"]), 3]
    assert ids == [*by_hand, 2]


def test_tokenizer_and_model_load_from_one_folder(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    config = small_llama(tokenizer, width=32, layers=1)
    new_model(config, seed=0).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = tokenizer.apply_chat_template(CONVERSATION, tokenize=False)
    assert loaded.apply_chat_template(CONVERSATION, tokenize=False) == text
    assert loaded.encode(text) == tokenizer.encode(text)
    assert loaded.decode(loaded.encode("Good to know.")) == "Good to know."
    assert (loaded.pad_token_id, loaded.eos_token_id) == (0, 3)
