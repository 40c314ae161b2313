"""The flags of both servers, `dovetail serve` and `dovetail label`, about labelling.

Responsible for: names and help. Not responsible for: their effect (label_pages.py).
"""

from typing import Annotated

import typer

LABELLING = "Labelling"

StoreUrl = Annotated[
    str,
    typer.Option(
        help="Database of the labels: a SQLite file (sqlite:///labels.db), which is made if it does not exist, or "
        "postgresql://user@host/database.",
        rich_help_panel=LABELLING,
    ),
]
OptionalStoreUrl = Annotated[
    str | None,
    typer.Option(
        help="Serve the labelling pages too, with this database: sqlite:///labels.db; see dovetail label.",
        rich_help_panel=LABELLING,
        show_default=False,
    ),
]
Project = Annotated[
    str,
    typer.Option(
        help="Name of the project: tasks that are labelled under the same guidelines.",
        rich_help_panel=LABELLING,
    ),
]
Prompts = Annotated[
    str | None,
    typer.Option(
        help="Source of the prompts that are answered for labelling: a file, a registered name, or "
        "{path: rows.csv, prompt: question}. Left out: only what was sampled before is labelled.",
        rich_help_panel=LABELLING,
        show_default=False,
    ),
]
UncertainFirst = Annotated[
    str | None,
    typer.Option(
        help="A reward model, or a run with one: pairs on which it is least sure are offered first.",
        rich_help_panel=LABELLING,
        show_default=False,
    ),
]
