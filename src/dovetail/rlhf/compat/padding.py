"""The predecessor's padded dictionaries, made from our packed records and turned back into them.

Responsible for: laying answers out as it does (prompts padded on the left, answers on the right), and back.
Not responsible for: what the numbers mean (trainer.py).

Shapes: B sequences, L padded tokens, W longest answer, T packed tokens. A column with one number per token has L - 1
entries: entry t belongs to token t + 1, as the predecessor's shifted logits have it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dovetail.batches import Experience, PackedBatch, pack
from dovetail.errors import ConfigError
from dovetail.model.forward import masked_index

Batch = Mapping[str, Tensor]
"""The predecessor's exchange format: tensors whose first dimension is the batch."""

COLUMNS = {
    "logprobs": "old_logprobs_T",
    "ref_logprobs": "reference_logprobs_T",
    "value": "old_values_T",
    "token_rewards": "rewards_T",
    "advantages": "advantages_T",
    "returns": "returns_T",
}
"""Entries with one number per token, and their names in an `Experience`."""

ROWS = ("input_ids", "attention_mask", "rewards", "scores", "finished")
"""The other entries that training reads."""


def unpadded(prompts: Tensor, mask: Tensor | None, pad: int | None) -> list[list[int]]:
    """Return the token ids of each row: those that `mask` marks, or all behind the pad tokens at the left."""
    if mask is not None:
        return [row[keep].tolist() for row, keep in zip(prompts.cpu(), mask.cpu().bool(), strict=True)]
    rows = []
    for row in prompts.tolist():
        start = next((k for k, token in enumerate(row) if token != pad), len(row))
        rows.append(row[start:])
    return rows


def padded(
    prompts: Sequence[Sequence[int]], packed: PackedBatch, columns: Mapping[str, Tensor], pad: int
) -> dict[str, Tensor]:
    """Return prompts, ids, mask and the per-token `columns` of packed sequences that begin with `prompts`."""
    width_prompt = max(map(len, prompts))
    starts = [width_prompt - len(ids) for ids in prompts]
    width = max(start + length for start, length in zip(starts, packed.lengths, strict=True))
    mask = torch.zeros((len(prompts), width), dtype=torch.long)
    for row, start, length in zip(mask, starts, packed.lengths, strict=True):
        row[start : start + length] = 1
    is_real = mask.bool()
    input_ids = torch.full(mask.shape, pad).masked_scatter(is_real, packed.token_ids_T.cpu())

    def laid_out(column_T: Tensor) -> Tensor:
        return torch.zeros(mask.shape).masked_scatter(is_real, column_T.float().cpu())[:, 1:].contiguous()

    return {
        "prompts": input_ids[:, :width_prompt],
        "input_ids": input_ids,
        "attention_mask": mask,
        **{name: laid_out(column_T) for name, column_T in columns.items()},
    }


def is_action(prompts: Tensor, action_mask: Tensor) -> Tensor:
    """Return bool [B, L - 1]: true where a column belongs to a token of an answer."""
    index = torch.arange(action_mask.shape[1], device=action_mask.device)
    return action_mask.bool() & (index >= prompts.shape[1] - 1)


def own_part(inputs: Batch) -> dict[str, Tensor]:
    """Return the entries of the padded dictionary that training reads, on the host, and the width of its prompts.

    Raises ConfigError if an entry is missing, or scores were changed after they had been turned into advantages.
    """
    missing = [name for name in (*COLUMNS, *ROWS, "prompts") if name not in inputs]
    if missing:
        raise ConfigError(
            f"train_rlhf: the batch has no {', '.join(missing)}",
            hint="pass on all entries of what generate_experience returned",
        )
    if not torch.equal(inputs["rewards"], inputs["scores"]):
        raise ConfigError(
            "train_rlhf: rewards were changed after generate_experience had made advantages of them",
            hint="override compute_rewards of the trainer, which is given the scores as reward_score",
        )
    width = torch.tensor(inputs["prompts"].shape[1])
    return {name: inputs[name].cpu() for name in (*COLUMNS, *ROWS)} | {"prompt_width": width}


def packed(parts: Sequence[Batch]) -> Experience:
    """Return the rows of several `own_part`s, one after the other, as experience."""
    rows: list[list[int]] = []
    answers: list[list[bool]] = []
    columns: dict[str, list[Tensor]] = {name: [] for name in COLUMNS}
    for part in parts:
        real = part["attention_mask"].bool()
        in_answer = real & (torch.arange(real.shape[1]) >= part["prompt_width"])
        rows += [ids[keep].tolist() for ids, keep in zip(part["input_ids"], real, strict=True)]
        answers += [row[keep].tolist() for row, keep in zip(in_answer, real, strict=True)]
        for name in COLUMNS:
            columns[name].append(torch.nn.functional.pad(part[name], (1, 0))[real])
    batch = pack(rows, answers)
    named: dict[str, Any] = {field.name: getattr(batch, field.name) for field in fields(batch)}
    named |= {
        COLUMNS[name]: torch.cat(found).masked_fill(~batch.mask_T, 0.0) for name, found in columns.items()
    }
    return Experience(
        **named,
        sampled_logprobs_T=torch.zeros(batch.num_tokens),
        scores_S=torch.cat([part["scores"] for part in parts]),
        finished_S=torch.cat([part["finished"] for part in parts]),
    )


def packed_texts(parts: Iterable[Batch]) -> PackedBatch:
    """Return rows of plain text, one after the other; tokens with the label -100 are not targets."""
    rows: list[list[int]] = []
    targets: list[list[bool]] = []
    for part in parts:
        real = part["attention_mask"].bool()
        counts = part.get("labels", part["input_ids"]) != -100
        rows += [ids[keep].tolist() for ids, keep in zip(part["input_ids"], real, strict=True)]
        targets += [row[keep].tolist() for row, keep in zip(counts, real, strict=True)]
    return pack(rows, targets)


def answers_of(micro: PackedBatch, *columns_T: Tensor) -> list[Tensor]:
    """Return each column's entries of the answers as [S, W], padded with 0 on the right."""
    index_A = masked_index(micro)
    sizes = list(micro.target_counts)
    return [
        pad_sequence(list(column_T.index_select(0, index_A).split_with_sizes(sizes)), batch_first=True)
        for column_T in columns_T
    ]
