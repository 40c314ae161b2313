"""`dovetail explain`: what a setting means.

Responsible for: the command. Not responsible for: the words (config/reference.py).
"""

from typing import Annotated

import typer

from dovetail.config.reference import explanation


def explain(
    setting: Annotated[
        str, typer.Argument(help="A setting or a group of settings, such as ppo.kl_coefficient or ppo.")
    ],
) -> None:
    """Say what a setting means: its type, its default, and where that comes from."""
    typer.echo(explanation(setting))
