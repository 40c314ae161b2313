"""`dovetail generate`: answers to a file of prompts.

Responsible for: the flags and the progress. Not responsible for: files (serving/inference/prompt_file.py,
answer_file.py), answers (serving/inference/chat_model.py).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dovetail.cli.user_paths import path as as_path
from dovetail.errors import DataError, DovetailError

if TYPE_CHECKING:
    from dovetail.engine.sampling import Sampling
    from dovetail.serving.inference.answer_file import AnswerFile
    from dovetail.serving.inference.chat_model import ChatModel, Reply
    from dovetail.serving.inference.prompt_file import Prompt


def generate(
    path: Annotated[str, typer.Argument(help="A run folder, a model folder, a .gguf file or a hub name.")],
    prompts: Annotated[Path, typer.Option(parser=as_path, help="JSON lines with `prompt` or `messages`.")],
    output: Annotated[
        Path, typer.Option(parser=as_path, help="JSON lines: the same columns, `answer`, `finish_reason`.")
    ],
    system: Annotated[str | None, typer.Option(help="System prompt.", show_default=False)] = None,
    temperature: Annotated[float, typer.Option(min=0, help="0 always takes the likeliest word.")] = 0.7,
    top_p: Annotated[
        float, typer.Option(min=0.01, max=1, help="Share of likeliest words to draw from.")
    ] = 0.95,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
    seed: Annotated[int, typer.Option(help="Row i is drawn with seed + i.")] = 0,
    skip_refused: Annotated[
        bool,
        typer.Option(
            "--skip-refused",
            help="Answer the other rows if the model refuses some (too long, or turns that its chat template does "
            "not take): these get `answer` null and `finish_reason` refused.",
        ),
    ] = False,
    device: Annotated[str, typer.Option(help="cuda, cpu, or auto.")] = "auto",
) -> None:
    """Answer every prompt of a file, many at once; the same command again continues where it stopped.

    dovetail generate runs/demo --prompts questions.jsonl --output answers.jsonl
    """
    from dovetail.engine.sampling import Sampling  # here and not above: these import torch
    from dovetail.serving.inference.answer_file import AnswerFile
    from dovetail.serving.inference.chat_model import ChatModel
    from dovetail.serving.inference.prompt_file import read_prompts

    rows = read_prompts(prompts)
    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p)
    model = ChatModel(path, device=device, system=system)
    settings = {
        "model": model.fingerprint(),
        "system": system,
        "temperature": temperature,
        "top_p": top_p,
        "max_new_tokens": max_new_tokens,
        "seed": seed,
    }
    with AnswerFile(output, rows, settings) as answers:
        _answer(rows, answers, model, sampling, seed=seed, skip_refused=skip_refused)


def _answer(
    rows: "Sequence[Prompt]",
    answers: "AnswerFile",
    model: "ChatModel",
    sampling: "Sampling",
    *,
    seed: int,
    skip_refused: bool,
) -> None:
    from dovetail.telemetry.log import say
    from dovetail.telemetry.progress import Progress

    done = answers.num_done
    if done:
        say(f"{done} of {len(rows)} answers are there already")
    if done == len(rows):
        return
    with Progress("generate", total=len(rows), start=done, print_every=100) as progress:

        def on_reply(reply: "Reply") -> None:
            answers.add(done + reply.index, reply.text, reply.finish_reason)
            progress.advance()

        def on_refusal(index: int, error: DovetailError) -> None:
            if not skip_refused:
                raise DataError(
                    f"{rows[done + index].where}: {error.message.removeprefix(f'request {index}: ')}",
                    hint="change that row, or answer the others: --skip-refused",
                ) from error
            answers.add(done + index, None, "refused")
            progress.advance()

        model.chat_many(
            [row.conversation for row in rows[done:]],
            sampling=sampling,
            seeds=[seed + index for index in range(done, len(rows))],
            on_reply=on_reply,
            on_refusal=on_refusal,
        )
