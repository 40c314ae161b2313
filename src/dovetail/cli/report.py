"""`dovetail report`: a page that shows a run, or compares several.

Responsible for: the command. Not responsible for: the page (stages/report.py).
"""

from pathlib import Path
from typing import Annotated

import typer

from dovetail.cli.user_paths import path as as_path


def report(
    runs: Annotated[
        list[Path], typer.Argument(parser=as_path, help="Run folders; several are compared with each other.")
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            parser=as_path,
            help="File to write. By default RUN/report.html, for several runs report.html here.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Write one HTML page: where a run stands, its warnings, curves, samples before and after, and settings.

    dovetail report runs/opt-1.3b
    dovetail report runs/first runs/second --output compared.html
    """
    from dovetail.stages.report import write_report  # here and not above: help must not wait for it

    to = output or (runs[0] / "report.html" if len(runs) == 1 else Path("report.html"))
    write_report(runs, to)
    typer.echo(to)
