"""Stage 2 with `algorithm: dpo`: the actor learns from comparisons directly (Rafailov et al. 2023, arXiv:2305.18290).

Responsible for: model, comparisons, reference, loss and evaluation of the stage.
Not responsible for: the equations (maths/preference.py), gradient steps (training/step.py), reading rows (data/).

The reference is the model that the stage starts from. It is never held beside the one that learns: before the first
step the model itself gives the log-probability of every answer. A resumed run loads the start model, does the same,
and only then loads its checkpoint.

Shapes: S answers, P preference pairs.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dovetail.batches import PackedBatch, PreferenceBatch, SummedLoss, moved, pack, pack_preferences
from dovetail.config.stages import DpoConfig
from dovetail.data.tokenize import TokenizedComparisons
from dovetail.errors import DataError
from dovetail.maths.preference import (
    dpo_loss,
    estimated_kl,
    ipo_loss,
    kto_loss,
    orpo_loss,
    pair_sums,
    simpo_loss,
)
from dovetail.model.forward import sequence_logprobs
from dovetail.rlhf.evaluation import answer_logprobs
from dovetail.stages.context import Context, StageReport
from dovetail.stages.models import actor_start, trainable_causal_lm
from dovetail.stages.rows import comparison_rows, expect_rows_fit, longest_row
from dovetail.stages.same_data import SameData
from dovetail.stages.saving import expect_savable, save_model
from dovetail.stages.supervised import Task, fit
from dovetail.telemetry.log import say

CHUNK_ROWS = 512
"""The number of prompts whose answers the reference scores together."""

Scorer = Callable[[PackedBatch], Tensor]
"""A function that returns the log-probability of each sequence's marked tokens, [S] on the CPU."""


def run(context: Context) -> StageReport:
    """Fit the actor to the comparisons; leaves `dpo/model`."""
    settings = context.config.dpo
    start, chat = actor_start(context)
    rows = comparison_rows(context, chat, "train")
    held_out_rows = comparison_rows(context, chat, "held_out")
    model = trainable_causal_lm(start, chat, settings, context)
    expect_rows_fit(model, rows, held_out_rows)
    folder, stops = context.folder.model("dpo"), chat.stop_token_ids
    expect_savable(model, chat.tokenizer, folder, stop_token_ids=stops)
    score = partial(answer_logprobs, model, max_tokens=settings.micro_batch_tokens, device=context.device)
    train = Preferences(rows, settings, score)
    held_out = Preferences(held_out_rows, settings, score) if len(held_out_rows) else None
    task = Task(
        stage="dpo",
        model=model,
        settings=settings,
        num_rows=len(rows),
        longest=longest_row(rows),
        longest_rows=rows.longest,
        batch_of=train.batch,
        loss_of=partial(preference_loss, model, settings),
        evaluate=lambda: {} if held_out is None else preference_quality(held_out, settings, score),
        data=SameData(context.folder.path / "dpo", chat, rows.fingerprint, held_out_rows.fingerprint),
    )
    results = fit(task, context)
    save_model(model, chat.tokenizer, folder, stop_token_ids=stops)
    return StageReport(task.total_steps, results)


class Preferences:
    """Comparisons as batches, with what the reference says of their answers where the loss asks for it."""

    def __init__(self, rows: TokenizedComparisons, settings: DpoConfig, score: Scorer) -> None:
        """Score the rows with the model as it is now, which makes that the reference."""
        self._rows, self._score = rows, score
        self._longest = len(longest_row(rows))
        starts = range(0, len(rows), CHUNK_ROWS)
        chunks = [range(start, min(start + CHUNK_ROWS, len(rows))) for start in starts]
        self._answers: list[list[float]] = []
        self._others: list[float] = []
        if settings.needs_reference:
            say(f"reference: the start model scores the answers of {len(rows)} {rows.report.part} rows")
            for chunk in chunks:
                batch = self._packed(chunk)
                self._answers += [own.tolist() for own in score(batch).split_with_sizes(batch.group_sizes)]
        if settings.loss == "kto":
            if len(rows) < 2:
                raise DataError(
                    "the loss kto estimates a KL from answers to other prompts, and there is only one row",
                    hint="give more comparisons, or another dpo.loss",
                )
            for chunk in chunks:
                self._others += score(self._answers_to_others(chunk)).tolist()

    def __len__(self) -> int:
        return len(self._rows)

    def batch(self, index: Sequence[int]) -> PreferenceBatch:
        """Pack the given rows; for KTO with the KL of the model as it is now."""
        reference = [value for i in index for value in self._answers[i]] if self._answers else None
        if not self._others:
            return self._packed(index, reference)
        others_S = torch.tensor([self._others[i] for i in index])
        kl = estimated_kl(self._score(self._answers_to_others(index)), others_S)
        return self._packed(index, reference, kl)

    def _packed(
        self, index: Sequence[int], reference: Sequence[float] | None = None, kl: float = 0.0
    ) -> PreferenceBatch:
        picked = [self._rows[i] for i in index]
        return pack_preferences(
            [answers for answers, _ in picked],
            [pairs for _, pairs in picked],
            [self._rows.prompt_tokens(i) for i in index],
            reference_logprobs=reference,
            kl=kl,
        )

    def _answers_to_others(self, index: Sequence[int]) -> PackedBatch:
        """Pack each row's prompt with an answer to the next row's, cut to the length of the longest row."""
        sequences, masks = [], []
        for i in index:
            other = (i + 1) % len(self._rows)
            answers, _ = self._rows[other]
            prompt = self._rows[i][0][0][: self._rows.prompt_tokens(i)]
            answer = answers[i % len(answers)][self._rows.prompt_tokens(other) :]
            sequences.append([*prompt, *answer][: self._longest])
            masks.append([place >= len(prompt) for place in range(len(sequences[-1]))])
        return pack(sequences, masks)


def preference_loss(model: PreTrainedModel, settings: DpoConfig, micro: PreferenceBatch) -> SummedLoss:
    """Return the loss of the pairs, each prompt's pairs together counting once."""
    total, sums = judged(sequence_logprobs(model, micro), micro, settings)
    stats = {f"train_{name}": value.detach() for name, value in sums.items()}
    return SummedLoss(total, micro.weight_P.sum(), stats)


def preference_quality(held_out: Preferences, settings: DpoConfig, score: Scorer) -> dict[str, float]:
    """Return loss, accuracy (ties count half) and rewards on held-out comparisons."""
    batch = held_out.batch(range(len(held_out)))
    total, sums = judged(score(batch), batch, settings)
    weight = batch.weight_P.sum()
    means = {name: float(value / weight) for name, value in {"held_out_loss": total, **sums}.items()}
    return {**means, "held_out_pairs": float(len(batch.chosen_P))}


def judged(
    logprobs_S: Tensor, batch: PreferenceBatch, settings: DpoConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the sums over pairs of the loss, and of what is reported beside it.

    logprobs_S: log-probabilities of the answers under the model that learns.
    """
    compared_S, beta = logprobs_S, settings.beta_in_force
    if batch.reference_logprobs_S is not None:
        compared_S = compared_S - batch.reference_logprobs_S
    if settings.loss in ("ipo", "simpo", "orpo"):
        compared_S = compared_S / moved(torch.tensor(batch.target_counts), compared_S.device)
    chosen_P, rejected_P = compared_S[batch.chosen_P], compared_S[batch.rejected_P]
    match settings.loss:
        case "sigmoid":
            loss_P = dpo_loss(chosen_P, rejected_P, beta=beta, label_smoothing=settings.label_smoothing)
        case "ipo":
            loss_P = ipo_loss(chosen_P, rejected_P, beta=beta)
        case "kto":
            loss_P = kto_loss(chosen_P, rejected_P, batch.kl, beta=beta)
        case "simpo":
            loss_P = simpo_loss(chosen_P, rejected_P, beta=beta, gamma=settings.simpo_gamma)
        case "orpo":
            loss_P = orpo_loss(chosen_P, rejected_P, beta=beta)
    sums = pair_sums(beta * chosen_P, beta * rejected_P, batch.weight_P)
    return (batch.weight_P * loss_P).sum(), sums
