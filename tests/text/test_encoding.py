from __future__ import annotations

import pytest
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from dovetail.text.template import Encoder
from tests.text.tokenizers import byte_level, sentence_piece


def with_end(tokenizer: PreTrainedTokenizerFast, front: str = "<s>") -> PreTrainedTokenizerFast:
    """Return a tokenizer that puts `front` before a text and `</s>` behind it."""
    pieces = [
        ("<s>", tokenizer.convert_tokens_to_ids("<s>")),
        ("</s>", tokenizer.convert_tokens_to_ids("</s>")),
    ]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{front} $A </s>".strip(), pair=f"{front} $A $B </s>".strip(), special_tokens=pieces
    )
    return tokenizer


@pytest.mark.parametrize("make", [byte_level, sentence_piece])
@pytest.mark.parametrize("text", ["hello there", "", "a </s>"])
def test_a_text_to_be_continued_has_no_end_of_text_behind_it(make: type, text: str) -> None:
    tokenizer = with_end(make(bos=True))
    bare = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert Encoder(tokenizer).as_given(text) == [tokenizer.bos_token_id, *bare]
    assert Encoder(with_end(make(bos=True), front="")).as_given(text) == bare


@pytest.mark.parametrize("make", [byte_level, sentence_piece])
def test_a_text_that_brings_its_first_token_gets_no_second_one(make: type) -> None:
    tokenizer = make(bos=True)
    ids = Encoder(tokenizer).as_given("<s>hello there")
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids == tokenizer("<s>hello there", add_special_tokens=False)["input_ids"]
