"""Prompts and plain text as the predecessor's script reads them, from our data layer.

Responsible for: `create_prompt_dataset`, `DataCollatorRLHF` and `get_unsupervised_data`.
Not responsible for: reading, splitting and tokenising (data/).
"""

from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from dovetail.config.data import DataConfig, SourceConfig
from dovetail.data.blend import load_stage
from dovetail.data.tokenize import fitting_prompts, tokenize_texts
from dovetail.errors import ConfigError
from dovetail.rlhf.compat.processes import joined_world
from dovetail.telemetry.log import say
from dovetail.text.chat_format import ChatFormat


class Rows(Dataset[Any]):
    """Rows of a data set, kept in memory."""

    def __init__(self, rows: Sequence[Any]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[index]


class DataCollatorRLHF:
    """A collator that pads prompts on the left to `max_token_len`."""

    def __init__(self, max_token_len: int, inference_tp_size: int) -> None:
        self.max_token_len = max_token_len

    def __call__(self, data: Sequence[tuple[Tensor, Tensor, int]]) -> dict[str, Tensor]:
        """Return `prompt` and `prompt_att_mask`, [B, max_token_len]."""
        pad = data[0][2]
        return {
            "prompt": torch.stack([self._padded(ids, pad) for ids, _, _ in data]),
            "prompt_att_mask": torch.stack([self._padded(mask, 0) for _, mask, _ in data]),
        }

    def _padded(self, row: Tensor, value: int) -> Tensor:
        return torch.nn.functional.pad(row, (self.max_token_len - len(row), 0), value=value)


def create_prompt_dataset(  # noqa: PLR0913 -- the signature is the predecessor's
    local_rank: int,
    data_path: Sequence[str],
    data_split: str,
    output_path: str,
    train_phase: int,
    seed: int | None,
    tokenizer: PreTrainedTokenizerBase,
    max_seq_len: int,
    **_: Any,
) -> tuple[Rows, Rows]:
    """Return the prompts of stage 3 to train on and those held out, as (ids, mask, pad token id) each.

    data_path: registered names, files, folders or hub names. data_split: shares of the three stages, such as 2,4,4;
    a hash of a row's content decides its stage, so that no index has to be kept in `output_path`.
    Raises ConfigError for another phase than 3 and for a split that is not three numbers.
    """
    if train_phase != 3:
        raise ConfigError(
            f"create_prompt_dataset: train_phase = {train_phase}, and only the prompts of phase 3 are made here",
            hint="train phases 1 and 2 with `dovetail sft` and `dovetail reward`",
        )
    config = DataConfig(
        blend=tuple(SourceConfig.model_validate(path) for path in data_path),
        stage_split=_shares(data_split),
        max_prompt_tokens=max_seq_len,
        seed=seed or 0,
    )
    chat = ChatFormat(tokenizer)
    pad = tokenizer.pad_token_id
    parts = []
    for part in ("train", "held_out"):
        with joined_world().first_goes_first():
            found = fitting_prompts(load_stage(config, "ppo", part), chat, config)
        for line in found.report.lines():
            say(line)
        ids = chat.encode_prompts([prompt.messages for prompt in found])
        parts.append(Rows([(torch.tensor(row), torch.ones(len(row), dtype=torch.long), pad) for row in ids]))
    return parts[0], parts[1]


def get_unsupervised_data(args: Namespace, tokenizer: PreTrainedTokenizerBase) -> Rows:
    """Return plain text in rows as long as a prompt with its answer; padding has the label -100."""
    width = args.max_prompt_seq_len + args.max_answer_seq_len
    source = SourceConfig(
        path=args.unsupervised_dataset_name, name=args.unsupervised_dataset_config_name, text="text"
    )
    config = DataConfig(pretraining=(source,), max_tokens=width)
    with joined_world().first_goes_first():
        texts = tokenize_texts(load_stage(config, "text", "train"), ChatFormat(tokenizer), config)
    for line in texts.report.lines():
        say(line)
    pad = tokenizer.pad_token_id or 0
    return Rows([_text_row(ids, width, pad) for ids, _ in texts])


def _text_row(ids: Sequence[int], width: int, pad: int) -> dict[str, Tensor]:
    missing = width - len(ids)
    return {
        "input_ids": torch.tensor([*ids, *[pad] * missing]),
        "attention_mask": torch.tensor([1] * len(ids) + [0] * missing),
        "labels": torch.tensor([*ids, *[-100] * missing]),
    }


def _shares(data_split: str) -> tuple[float, float, float]:
    try:
        first, second, third = (float(share) for share in data_split.split(","))
    except ValueError as error:
        raise ConfigError(
            f"--data_split = {data_split!r} is not three numbers", hint="write them like 2,4,4"
        ) from error
    return first, second, third
