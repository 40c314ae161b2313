"""`dovetail data preview`: rows as the model will see them.

Responsible for: the command. Not responsible for: reading and showing rows (data/preview.py).
"""

from typing import Annotated, Literal

import typer

from dovetail.cli.run_settings import Flags, resolve
from dovetail.cli.train import ActorModel, Data, Overrides, Recipe


def preview(
    recipe: Recipe = None,
    overrides: Overrides = None,
    actor_model: ActorModel = None,
    data: Data = None,
    stage: Annotated[
        Literal["sft", "reward", "ppo", "text"], typer.Option(help="Stage that reads the rows.")
    ] = "sft",
    count: Annotated[int, typer.Option("-n", "--count", min=1, help="How many rows.")] = 3,
) -> None:
    """Show rows of a stage as the model reads them: with chat markers; the tokens to learn are coloured.

    If the output is not a terminal, the tokens to learn stand in [[ ]].

      dovetail data preview opt-1.3b --stage reward
      dovetail data preview --actor-model gpt2 --data my_pairs.jsonl -n 5
    """
    resolved = resolve(recipe, overrides or (), Flags(actor_model=actor_model, data=data or ()))
    from rich.console import Console  # here and not above: help must not wait for these

    from dovetail.data.preview import preview as preview_rows
    from dovetail.text.chat_format import ChatFormat
    from dovetail.text.tokenizer import load_tokenizer

    actor = resolved.config.actor
    tokenizer = load_tokenizer(
        actor.path,
        revision=actor.revision,
        trust_remote_code=actor.trust_remote_code,
        chat_template=actor.chat_template,
    )
    console = Console(soft_wrap=True)
    for shown in preview_rows(resolved.config.data_of_stages(), ChatFormat(tokenizer), stage, count):
        console.print(shown)
