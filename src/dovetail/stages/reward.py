"""Stage 2: the reward model on ranked answers (InstructGPT, section 3.5 and equation 1).

Responsible for: model, comparisons, ranking loss and evaluation of the stage, and centring its scores.
Not responsible for: gradient steps (training/step.py), reading rows (data/).

Shapes: S answers, P preference pairs.
"""

from functools import partial

from transformers import PreTrainedModel

from dovetail.batches import RankedBatch, SummedLoss
from dovetail.maths.ranking import ranking_loss, won_pairs
from dovetail.model.forward import last_scores
from dovetail.rlhf.evaluation import reward_accuracy
from dovetail.stages.context import Context, StageReport
from dovetail.stages.models import centre_on_demonstrations, reward_start, trainable_scalar_model
from dovetail.stages.rows import comparison_rows, expect_rows_fit, longest_row, pack_comparisons
from dovetail.stages.same_data import SameData
from dovetail.stages.saving import expect_savable, save_model
from dovetail.stages.supervised import Task, fit


def run(context: Context) -> StageReport:
    """Fit the reward model to the comparisons and centre it on the demonstrations; leaves `reward/model`."""
    config = context.config
    start, chat = reward_start(context)
    train = comparison_rows(context, chat, "train")
    held_out = comparison_rows(context, chat, "held_out")
    judged = pack_comparisons(held_out, range(len(held_out))) if len(held_out) else None
    model = trainable_scalar_model(start, chat, context)
    expect_rows_fit(model, train, held_out)
    task = Task(
        stage="reward",
        model=model,
        settings=config.reward,
        num_rows=len(train),
        longest=longest_row(train),
        longest_rows=train.longest,
        batch_of=partial(pack_comparisons, train),
        loss_of=partial(pairwise_loss, model),
        evaluate=lambda: reward_accuracy(model, judged, config.reward.micro_batch_tokens, context.device),
        data=SameData(context.folder.path / "reward", chat, train.fingerprint, held_out.fingerprint),
    )
    folder, stops = context.folder.model("reward"), chat.stop_token_ids
    expect_savable(model, chat.tokenizer, folder, stop_token_ids=stops)
    fit(task, context)
    centring = centre_on_demonstrations(model, train, context)
    save_model(model, chat.tokenizer, folder, stop_token_ids=stops)
    pairs = {"held_out_pairs": float(len(judged.chosen_P))} if judged is not None else {}
    return StageReport(task.total_steps, {**task.evaluate(), **pairs, **centring})


def pairwise_loss(model: PreTrainedModel, micro: RankedBatch) -> SummedLoss:
    """-log sigmoid(r_chosen - r_rejected - margin), each prompt's pairs together counting once."""
    scores_S = last_scores(model, micro)
    chosen_P, rejected_P = scores_S[micro.chosen_P], scores_S[micro.rejected_P]
    total = ranking_loss(chosen_P, rejected_P, micro.margin_P, micro.weight_P)
    right = (won_pairs(chosen_P, rejected_P) * micro.weight_P).sum()
    return SummedLoss(total, micro.weight_P.sum(), {"train_accuracy": right.detach()})
