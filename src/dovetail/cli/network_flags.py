"""The flags of both servers, `dovetail serve` and `dovetail label`, that say how they are reached.

Responsible for: names and help. Not responsible for: what they mean (web/).
"""

from pathlib import Path
from typing import Annotated

import typer

from dovetail.cli.user_paths import path

NETWORK = "Network"

Host = Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all.", rich_help_panel=NETWORK)]
Port = Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.", rich_help_panel=NETWORK)]
AllowHost = Annotated[
    list[str] | None,
    typer.Option(
        help="A name under which clients reach this server, beside its addresses, localhost and the machine's own "
        "name; may be repeated.",
        rich_help_panel=NETWORK,
        show_default=False,
    ),
]
TlsCertificate = Annotated[
    Path | None,
    typer.Option(
        parser=path,
        help="Speak HTTPS with the certificate in this PEM file, which also holds those that signed it.",
        rich_help_panel=NETWORK,
        show_default=False,
    ),
]
TlsKey = Annotated[
    Path | None,
    typer.Option(
        parser=path,
        help="Its private key, where that is another file.",
        rich_help_panel=NETWORK,
        show_default=False,
    ),
]
