"""A pad token for reward models, so that transformers reads their scores at the same token as Dovetail.

Responsible for: finding a token that can fill a batch and never ends a text, or making one.
Not responsible for: Dovetail's own forwards, which are packed and know no padding.

`...ForSequenceClassification` reads the score at the last token that is not the pad token. Many tokenizers pad
with the token that ends an answer; there it would read the score one token too early.
"""

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dovetail.model.copies import copy_of

NEW_PAD = "<|pad|>"


@dataclass(frozen=True, slots=True)
class ScorePadding:
    """The padding that a reward model's folder declares."""

    tokenizer: PreTrainedTokenizerBase
    """A copy that pads with `token_id`."""
    token_id: int
    num_rows: int
    """The rows that the embedding needs; more than the model has only where a token had to be added."""


def padding_for_scores(
    tokenizer: PreTrainedTokenizerBase, num_rows: int, stop_token_ids: Sequence[int]
) -> ScorePadding:
    """Choose the tokenizer's own pad token if it never ends an answer; else another special token; else a new one."""
    tokenizer = copy.deepcopy(tokenizer)
    ends = {*stop_token_ids, tokenizer.eos_token_id}
    for token in _candidates(tokenizer):
        token_id = tokenizer.convert_tokens_to_ids(token)
        if isinstance(token_id, int) and token_id not in ends and token_id < num_rows:
            tokenizer.pad_token = token
            return ScorePadding(tokenizer, token_id, num_rows)
    # The next free id may have a row already: embeddings are often rounded up.
    tokenizer.add_special_tokens({"pad_token": NEW_PAD})
    token_id = tokenizer.convert_tokens_to_ids(NEW_PAD)
    assert isinstance(token_id, int)
    return ScorePadding(tokenizer, token_id, max(num_rows, token_id + 1))


def num_rows(model: Any) -> int:
    """Return the number of rows of the model's embedding, also where an adapter trains a few of them."""
    embedding = model.get_input_embeddings()
    return int(getattr(embedding, "original_module", embedding).num_embeddings)


def with_rows(model: PreTrainedModel, num_rows: int) -> PreTrainedModel:
    """Return a copy on the CPU with that many embedding rows; new ones are zero, and nothing attends to them."""
    grown: Any = copy_of(model, device=torch.device("cpu"))
    old_rows = grown.get_input_embeddings().weight.shape[0]
    with torch.random.fork_rng(devices=[]):
        grown.resize_token_embeddings(num_rows, mean_resizing=False)
    with torch.no_grad():
        grown.get_input_embeddings().weight[old_rows:] = 0
    resized: PreTrainedModel = grown
    return resized


def _candidates(tokenizer: PreTrainedTokenizerBase) -> Iterable[str]:
    """Return special tokens, best first: the pad token, those with "pad" in their name, unk, bos, the rest."""
    special = [token for token in tokenizer.all_special_tokens if token is not None]
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    named_pad = [token for token in [*special, *added] if "pad" in token.lower()]
    own = (tokenizer.pad_token, *named_pad, tokenizer.unk_token, tokenizer.bos_token, *special, *added)
    return [token for token in own if token is not None]
