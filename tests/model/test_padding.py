"""The pad token of reward models is never one that ends an answer."""

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from dovetail.model.padding import NEW_PAD, padding_for_scores
from tests.fakes import END, PAD, byte_tokenizer

EOS = 256


def tokenizer_with(**special: str) -> PreTrainedTokenizerFast:
    """Bytes, END as id 256, then the special tokens in the order given."""
    core = byte_tokenizer().backend_tokenizer
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=END)
    tokenizer.add_special_tokens(special)
    return tokenizer


def test_a_pad_token_of_its_own_is_kept():
    chosen = padding_for_scores(byte_tokenizer(), 258, (EOS,))
    assert (chosen.tokenizer.pad_token, chosen.token_id, chosen.num_rows) == (PAD, 257, 258)


def test_the_tokenizer_given_stays_as_it_is():
    tokenizer = tokenizer_with(pad_token=END)
    padding_for_scores(tokenizer, 300, (EOS,))
    assert tokenizer.pad_token == END
    assert NEW_PAD not in tokenizer.get_vocab() or PAD == NEW_PAD


def test_a_token_named_pad_is_taken_before_others():
    tokenizer = tokenizer_with(pad_token=END, unk_token="<unk>")
    tokenizer.add_tokens([AddedToken("<|finetune_right_pad_id|>", special=True)])
    assert padding_for_scores(tokenizer, 400, (EOS, 257)).tokenizer.pad_token in (
        PAD,
        "<|finetune_right_pad_id|>",
    )


def test_any_token_that_ends_answers_is_passed_over():
    tokenizer = tokenizer_with(unk_token="<unk>", bos_token="<s>")
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in (PAD, "<unk>", "<s>")}
    chosen = padding_for_scores(tokenizer, 400, (EOS, ids[PAD]))
    assert chosen.tokenizer.pad_token == "<unk>"
    chosen = padding_for_scores(tokenizer, 400, (EOS, ids[PAD], ids["<unk>"]))
    assert chosen.tokenizer.pad_token == "<s>"


def bare() -> PreTrainedTokenizerFast:
    """257 tokens, of which one is special and ends everything, as GPT-2's."""
    from tokenizers import Tokenizer, models

    letters = {chr(0x100 + i): i for i in range(256)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(vocab=letters, merges=[])), eos_token=END, pad_token=END
    )


def test_a_spare_row_of_the_embedding_is_used_before_it_grows():
    chosen = padding_for_scores(bare(), 260, (EOS,))
    assert (chosen.tokenizer.pad_token, chosen.token_id, chosen.num_rows) == (NEW_PAD, 257, 260)


def test_without_a_spare_row_one_is_added():
    chosen = padding_for_scores(bare(), 257, (EOS,))
    assert (chosen.token_id, chosen.num_rows) == (257, 258)
