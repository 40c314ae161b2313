"""Stage 1: supervised fine-tuning on demonstrations (InstructGPT, section 3.5).

Responsible for: model, rows, loss and evaluation of the stage; the whole path is here and in supervised.py.
Not responsible for: gradient steps (training/step.py), reading rows (data/).
"""

from functools import partial

from dovetail.model.forward import language_model_loss
from dovetail.rlhf.evaluation import language_model_quality
from dovetail.stages.context import Context, StageReport
from dovetail.stages.models import chat_of, trainable_causal_lm
from dovetail.stages.rows import demonstration_rows, expect_rows_fit, longest_row, pack_rows
from dovetail.stages.same_data import SameData
from dovetail.stages.saving import expect_savable, save_model
from dovetail.stages.supervised import Task, fit


def run(context: Context) -> StageReport:
    """Fit the actor to the demonstrations; leaves `sft/model`."""
    config = context.config
    chat = chat_of(config.actor)
    train = demonstration_rows(context, chat, "train")
    held_out = demonstration_rows(context, chat, "held_out")
    judged = pack_rows(held_out, range(len(held_out))) if len(held_out) else None
    model = trainable_causal_lm(config.actor, chat, config.sft, context)
    expect_rows_fit(model, train, held_out)
    task = Task(
        stage="sft",
        model=model,
        settings=config.sft,
        num_rows=len(train),
        longest=longest_row(train),
        longest_rows=train.longest,
        batch_of=partial(pack_rows, train),
        loss_of=partial(language_model_loss, model),
        evaluate=lambda: language_model_quality(model, judged, config.sft.micro_batch_tokens, context.device),
        data=SameData(context.folder.path / "sft", chat, train.fingerprint, held_out.fingerprint),
    )
    folder, stops = context.folder.model("sft"), chat.stop_token_ids
    expect_savable(model, chat.tokenizer, folder, stop_token_ids=stops)
    results = fit(task, context)
    save_model(model, chat.tokenizer, folder, stop_token_ids=stops)
    return StageReport(task.total_steps, results)
