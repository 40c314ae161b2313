"""The flags of both servers, `dovetail serve` and `dovetail label`, about the network.

Responsible for: names and help. Not responsible for: their effect (serving/http/).
"""

from pathlib import Path
from typing import Annotated

import typer

from dovetail.cli.user_paths import path

NETWORK = "Network"

Host = Annotated[
    str, typer.Option(help="Address to listen on; 0.0.0.0 for all addresses.", rich_help_panel=NETWORK)
]
Port = Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free port.", rich_help_panel=NETWORK)]
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
        help="Speak HTTPS with the certificate in this PEM file, which also holds the certificates that signed it.",
        rich_help_panel=NETWORK,
        show_default=False,
    ),
]
TlsKey = Annotated[
    Path | None,
    typer.Option(
        parser=path,
        help="Private key of the certificate, if it is in another file.",
        rich_help_panel=NETWORK,
        show_default=False,
    ),
]
