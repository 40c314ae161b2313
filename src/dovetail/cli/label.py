"""`dovetail label`: pages where people compare a model's answers, and the export of their labels.

Responsible for: the commands `start`, `export`, `invite` and `revoke`; `dovetail label MODEL` means `start`.
Not responsible for: the parts of the server (label_pages.py), pages (serving/labelling/), storage (data/labels/).
"""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from dovetail.cli.label_pages import Wanted, loaded_answerers, opened, print_links, supply_of
from dovetail.cli.labelling_flags import Project, Prompts, StoreUrl, UncertainFirst
from dovetail.cli.network_flags import AllowHost, Host, Port, TlsCertificate, TlsKey
from dovetail.cli.user_paths import path
from dovetail.errors import ConfigError
from dovetail.text_file import read_text

if TYPE_CHECKING:
    from dovetail.data.labels.database import Store
    from dovetail.serving.http.listening import Listening
    from dovetail.serving.labelling.supply import Supply

PEOPLE = "People"
SAMPLING = "Sampling"


class StartByDefault(TyperGroup):
    """A group whose first argument is a command, or else the first argument of `start`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put `start` before an argument that is not a command."""
        is_command = bool(args) and (args[0] in self.commands or args[0] in ("--help", "-h"))
        return super().parse_args(ctx, args if is_command or not args else ["start", *args])


app = typer.Typer(
    cls=StartByDefault,
    no_args_is_help=True,
    help="""People compare a model's answers in the browser; a reward model learns from it.

    dovetail label MODEL ... is dovetail label start MODEL ...; see dovetail label start --help.""",
)


Models = Annotated[
    list[str] | None,
    typer.Argument(
        help="One or two run folders or models whose answers are compared. Left out: only what was sampled "
        "before is labelled.",
        show_default=False,
    ),
]
Overlap = Annotated[
    int | None,
    typer.Option(min=1, help="Annotators per pair. By default the project's own number, at first 1."),
]
Guidelines = Annotated[
    Path | None,
    typer.Option(parser=path, help="A text file that annotators see beside their work.", show_default=False),
]
Invite = Annotated[
    list[str] | None,
    typer.Option(
        help="Print a link for this annotator. May be given several times.",
        rich_help_panel=PEOPLE,
        show_default=False,
    ),
]
Answers = Annotated[int, typer.Option(min=2, max=9, help="Answers to each prompt.", rich_help_panel=SAMPLING)]
Ahead = Annotated[int, typer.Option(min=1, help="Tasks to keep ready.", rich_help_panel=SAMPLING)]
BatchSize = Annotated[int, typer.Option(min=1, help="Prompts sampled at once.", rich_help_panel=SAMPLING)]
Temperature = Annotated[float, typer.Option(min=0, help="Higher is more varied.", rich_help_panel=SAMPLING)]
TopP = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=1,
        help="Draw from the likeliest words that make up this share.",
        rich_help_panel=SAMPLING,
        show_default=False,
    ),
]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Longest answer.", rich_help_panel=SAMPLING)]
Seed = Annotated[
    int, typer.Option(min=0, help="The same seed samples the same answers.", rich_help_panel=SAMPLING)
]
Device = Annotated[str, typer.Option(help="cuda, cpu, or auto.", rich_help_panel=SAMPLING)]


@app.command()
def start(
    models: Models = None,
    store: StoreUrl = "sqlite:///labels.db",
    prompts: Prompts = None,
    project: Project = "default",
    overlap: Overlap = None,
    guidelines: Guidelines = None,
    uncertain_first: UncertainFirst = None,
    invite: Invite = None,
    host: Host = "127.0.0.1",
    port: Port = 8001,
    allow_host: AllowHost = None,
    tls_certificate: TlsCertificate = None,
    tls_key: TlsKey = None,
    answers: Answers = 2,
    ahead: Ahead = 64,
    batch_size: BatchSize = 16,
    temperature: Temperature = 1.0,
    top_p: TopP = None,
    max_new_tokens: MaxNewTokens = 256,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Sample answers and serve the pages on which people compare them, until Ctrl-C.

      dovetail label runs/demo-tiny-0 --prompts my_prompts.jsonl --invite ann --invite ben --overlap 2

      dovetail label runs/demo-tiny-0/sft/model runs/demo-tiny-0 --prompts my_prompts.jsonl

      dovetail label --store sqlite:///labels.db --project default

    Prints a link for the admin, and one for each --invite. Only hashes of links are kept; to replace a lost
    link, invite again. Each label is on disk before the page shows the next pair.
    """
    _expect_models_with_prompts(models or [], prompts, uncertain_first)
    text = None if guidelines is None else _read(guidelines)
    from dovetail.data.labels.tasks import open_project
    from dovetail.serving.http.listening import certificate_of, listen

    with (
        opened(store) as database,
        listen(host, port, certificate_of(tls_certificate, tls_key)) as listening,
    ):
        project_id = open_project(database, project, overlap=overlap, guidelines=text)
        supply = None
        if prompts is not None:
            from dovetail.engine.sampling import Sampling  # here and not above: it imports torch
            from dovetail.serving.labelling.supply import Plan

            sampling = Sampling(temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens)
            plan = Plan(
                sampling=sampling, answers_per_prompt=answers, batch_size=batch_size, ahead=ahead, seed=seed
            )
            wanted = Wanted(prompts, uncertain_first, device)
            supply = supply_of(
                database, project_id, wanted, plan, lambda: loaded_answerers(models or [], device)
            )
        print_links(database, invite or [], listening.url)
        _serve(database, project_id, supply, listening, allow_host or [])


@app.command()
def export(
    store: StoreUrl = "sqlite:///labels.db",
    output: Annotated[Path, typer.Option("--output", "-o", parser=path, help="File to write.")] = Path(
        "pairs.jsonl"
    ),
    project: Annotated[
        str | None, typer.Option(help="Only this project. By default all.", show_default=False)
    ] = None,
) -> None:
    """Write the comparisons, one JSON object per line: prompt, chosen, rejected, and where each is from.

      dovetail label export --store sqlite:///labels.db --output pairs.jsonl

    Ties, and pairs in which both answers are bad, are left out. An edited answer counts as better than all answers
    shown. Labels that were undone or voided do not count. The reward stage can also read the
    database itself: data.blend='\\[labels:sqlite:///labels.db]'.
    """
    from dovetail.serving.labelling.export import export as write

    with opened(store, must_exist=True) as database:
        count = write(database, output, project)
    typer.echo(f"written: {output}, {count} comparisons")


@app.command()
def invite(
    name: Annotated[str, typer.Argument(help="Name of the annotator.")],
    store: StoreUrl = "sqlite:///labels.db",
    admin: Annotated[
        bool,
        typer.Option(
            "--admin", help="Invite an admin, who sees all labels, invites people and voids labels."
        ),
    ] = False,
) -> None:
    """Print a token with which a person can log in. Only its hash is kept, so that it cannot be shown again."""
    from dovetail.data.labels.annotators import invite as new_token

    with opened(store) as database:
        typer.echo(new_token(database, name, is_admin=admin))


@app.command()
def revoke(
    name: Annotated[str, typer.Argument(help="Name of the person whose invitations end.")],
    store: StoreUrl = "sqlite:///labels.db",
) -> None:
    """End all invitations of a person. The labels stay, and a new invitation lets the person in again."""
    from dovetail.data.labels.annotators import revoke as end_tokens

    with opened(store, must_exist=True) as database:
        count = end_tokens(database, name)
    typer.echo(f"{name}: {count} invitations revoked")


def _serve(
    store: "Store",
    project_id: int,
    supply: "Supply | None",
    listening: "Listening",
    host_names: Sequence[str],
) -> None:
    from dovetail.serving.labelling.router import labelling_router
    from dovetail.serving.labelling.server import labelling_app, serve

    options = {} if supply is None else {"supply": supply.state}
    router = labelling_router(store, project_id, **options)
    with nullcontext() if supply is None else supply.running():
        serve(labelling_app(router, host_names=host_names), listening)


def _expect_models_with_prompts(
    models: Sequence[str], prompts: str | None, uncertain_first: str | None
) -> None:
    if len(models) > 2:
        raise ConfigError(f"{len(models)} models were given", hint="compare the answers of one or two")
    if models and prompts is None:
        raise ConfigError(
            "--prompts is missing", hint="name the prompts that the models answer: --prompts prompts.jsonl"
        )
    if uncertain_first is not None and prompts is None:
        raise ConfigError(
            "--uncertain-first scores answers when they are sampled, and none are sampled here",
            hint="give a model and --prompts too",
        )
    if prompts is not None and not models:
        raise ConfigError("--prompts needs a model to answer them", hint="dovetail label MODEL --prompts ...")


def _read(guidelines: Path) -> str:
    try:
        return read_text(guidelines)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--guidelines {guidelines}: {error}", hint="give a text file in UTF-8") from error
