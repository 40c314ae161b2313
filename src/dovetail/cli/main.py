"""`dovetail`: the commands, their help, and the errors that a user sees.

Responsible for: the command tree, list-valued flags, errors as message and hint, exit codes (0 done, 1 a fault of
Dovetail, 2 a mistake that the user can repair, 3 the processes of a run did not start, did not meet or were lost,
75 saved and ended by a signal, 130 ended by Ctrl-C). Not responsible for: the work of a command (the modules beside
this file).
"""

import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Annotated

import typer

import dovetail
from dovetail.cli import (
    chat,
    data,
    demo,
    doctor,
    evaluate,
    explain,
    export,
    generate,
    label,
    plan,
    report,
    serve,
    train,
)
from dovetail.cli.flag_lists import repeat_flags
from dovetail.errors import DovetailError

HELP = """From a pretrained language model to a chat model trained with human feedback.

Three stages, after InstructGPT: supervised fine-tuning on demonstrations (sft), a reward model from
comparisons (reward), and PPO against it (ppo). [bold]train[/bold] runs all three; a finished stage is skipped
when you run the same command again, a half-finished one continues where it stopped.
"""
EPILOG = """Begin here:
  dovetail demo                                  the whole system in minutes, no GPU, no downloads
  dovetail train opt-1.3b --dry-run              every setting, and what stands in the way of a run
  dovetail plan opt-13b --gpu a100-80g           will it fit, how long, what does it cost
  dovetail train opt-1.3b data.blend='\\[my_pairs.jsonl]'
  dovetail chat runs/opt-1.3b                    talk to the result
  dovetail label runs/opt-1.3b --prompts my_prompts.jsonl
  dovetail explain ppo.kl_coefficient            what a setting means
  dovetail serve runs/opt-1.3b                   the same in the browser, and for any OpenAI client"""

app = typer.Typer(
    name="dovetail",
    help=HELP,
    epilog=EPILOG.replace("\n", "\n\n"),
    rich_markup_mode="rich",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
TRAINING = "Train"
RESULTS = "Use the result"
LOOKING = "Look before and after"

app.command("train", rich_help_panel=TRAINING)(train.train)
app.command("sft", rich_help_panel=TRAINING)(train.sft)
app.command("reward", rich_help_panel=TRAINING)(train.reward)
app.command("ppo", rich_help_panel=TRAINING)(train.ppo)
app.command("demo", rich_help_panel=TRAINING)(demo.demo)
app.command("chat", rich_help_panel=RESULTS)(chat.chat)
app.add_typer(label.app, name="label", rich_help_panel=RESULTS)
app.command("generate", rich_help_panel=RESULTS)(generate.generate)
app.command("eval", rich_help_panel=RESULTS)(evaluate.evaluate)
app.command("serve", rich_help_panel=RESULTS)(serve.serve)
app.command("api-key", rich_help_panel=RESULTS)(serve.api_key)
app.command("export", rich_help_panel=RESULTS)(export.export)
app.command("doctor", rich_help_panel=LOOKING)(doctor.doctor)
app.command("plan", rich_help_panel=LOOKING)(plan.plan)
app.command("report", rich_help_panel=LOOKING)(report.report)
app.command("explain", rich_help_panel=LOOKING)(explain.explain)
data_app = typer.Typer(no_args_is_help=True, help="Look at the data as the model will see it.")
data_app.command("preview")(data.preview)
app.add_typer(data_app, name="data", rich_help_panel=LOOKING)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dovetail {dovetail.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Take the options of `dovetail` itself; the commands do the work."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and leave the process with its exit code."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    try:
        app(repeat_flags(argv), obj=tuple(argv))
    except DovetailError as error:
        with suppress(OSError):  # the terminal may be gone; the exit code says what to do
            typer.secho(f"error: {error.message}", fg="red", err=True)
            if error.hint:
                typer.echo(f"hint: {error.hint}", err=True)
        sys.exit(error.exit_code)
