"""`dovetail serve` and `dovetail api-key`: finished models behind OpenAI's API, with a web chat.

Responsible for: the flags. Not responsible for: the server (serving/).
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dovetail.cli.labelling_flags import LABELLING, OptionalStoreUrl, Project, Prompts, UncertainFirst
from dovetail.cli.network_flags import NETWORK, AllowHost, Host, Port, TlsCertificate, TlsKey
from dovetail.cli.user_paths import path
from dovetail.errors import ConfigError

if TYPE_CHECKING:
    from dovetail.cli.label_pages import LabelTab
    from dovetail.serving.gate import RequestLimits
    from dovetail.serving.served_model import EngineSettings

_LIMITS = "Limits"
_PATHS = "Run folders, model folders, LoRA adapters, .gguf files or hub names; NAME=PATH names one."

Paths = Annotated[list[str], typer.Argument(metavar="PATH...", help=_PATHS)]
KeyFile = Annotated[
    Path | None,
    typer.Option(
        parser=path,
        help="Require an API key whose hash is in this file; see dovetail api-key.",
        rich_help_panel=NETWORK,
        show_default=False,
    ),
]
Origins = Annotated[
    list[str] | None,
    typer.Option(
        help="Origin whose web pages may call this server; may be repeated.",
        rich_help_panel=NETWORK,
        show_default=False,
    ),
]
Device = Annotated[str, typer.Option(help="cuda, cpu, or auto.")]
Running = Annotated[
    int, typer.Option(min=1, help="Largest number of answers that one model decodes together.")
]
CacheTokens = Annotated[
    int, typer.Option(min=64, help="Tokens of prompts and answers that each model keeps in memory.")
]
DrainSeconds = Annotated[
    float, typer.Option(min=0, help="Seconds that answers under way may take after SIGTERM.")
]
Waiting = Annotated[
    int, typer.Option(min=0, help="Largest number of waiting answers; more get 429.", rich_help_panel=_LIMITS)
]
BodyBytes = Annotated[int, typer.Option(min=1, help="Largest request, in bytes.", rich_help_panel=_LIMITS)]
PromptTokens = Annotated[
    int | None,
    typer.Option(min=1, help="Longest prompt.", rich_help_panel=_LIMITS, show_default="the context"),
]
NewTokens = Annotated[
    int | None,
    typer.Option(
        min=1, help="Longest answer.", rich_help_panel=_LIMITS, show_default="the context; 256 for labelling"
    ),
]
Choices = Annotated[int, typer.Option(min=1, help="Most answers to one request.", rich_help_panel=_LIMITS)]
PerMinute = Annotated[
    float | None,
    typer.Option(
        min=0.01,
        help="Requests of one key, or of one address if no keys are required.",
        rich_help_panel=_LIMITS,
        show_default="no limit",
    ),
]
Compare = Annotated[
    list[str] | None,
    typer.Option(
        help="Name of a served model whose answers are compared; twice for two models.",
        rich_help_panel=LABELLING,
        show_default="the first",
    ),
]


def serve(
    paths: Paths,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    allow_host: AllowHost = None,
    tls_certificate: TlsCertificate = None,
    tls_key: TlsKey = None,
    api_key_file: KeyFile = None,
    cors_origin: Origins = None,
    device: Device = "auto",
    max_running: Running = 64,
    cache_tokens: CacheTokens = 32768,
    max_waiting: Waiting = 256,
    max_body_bytes: BodyBytes = 1 << 20,
    max_prompt_tokens: PromptTokens = None,
    max_new_tokens: NewTokens = None,
    max_choices: Choices = 16,
    requests_per_minute: PerMinute = None,
    store: OptionalStoreUrl = None,
    project: Project = "default",
    prompts: Prompts = None,
    compare: Compare = None,
    uncertain_first: UncertainFirst = None,
    drain_seconds: DrainSeconds = 60,
) -> None:
    """Serve models to any OpenAI client, and a chat page to browsers.

      dovetail serve runs/demo
      dovetail serve before=HuggingFaceTB/SmolLM2-135M after=runs/smollm2 --port 8080
      dovetail serve runs/demo --store sqlite:///labels.db --prompts my_prompts.jsonl

    A run folder stands for all its finished chat models: ppo, ppo-ema, sft.
    """
    from dovetail.cli.label_pages import LabelTab  # here and not above: these import torch
    from dovetail.serving.gate import RequestLimits
    from dovetail.serving.served_model import EngineSettings

    limits = RequestLimits(
        max_body_bytes=max_body_bytes,
        max_prompt_tokens=max_prompt_tokens,
        max_new_tokens=max_new_tokens,
        max_choices=max_choices,
        requests_per_minute=requests_per_minute,
    )
    settings = EngineSettings(
        device=device, max_running=max_running, max_waiting=max_waiting, cache_tokens=cache_tokens
    )
    _expect_what_labels_need(store, prompts, compare or uncertain_first)
    tab = None
    if store is not None:
        tab = LabelTab(store, project, prompts, compare or (), uncertain_first, max_new_tokens or 256)
    network = Network(host, port, tls_certificate, tls_key, allow_host or (), cors_origin or (), api_key_file)
    _serve(paths, settings, limits, network, tab, drain_seconds)


@dataclass(frozen=True, slots=True)
class Network:
    """The flags about the network, as they were typed."""

    host: str
    port: int
    certificate: Path | None
    key: Path | None
    names: Sequence[str]
    origins: Sequence[str]
    api_key_file: Path | None


def _serve(
    paths: Sequence[str],
    settings: "EngineSettings",
    limits: "RequestLimits",
    network: Network,
    tab: "LabelTab | None",
    drain_seconds: float,
) -> None:
    from dovetail.cli.label_pages import label_section
    from dovetail.serving.app import create_app
    from dovetail.serving.http.listening import certificate_of, listen
    from dovetail.serving.keys import read_keys
    from dovetail.serving.served_model import load_models
    from dovetail.serving.server import run
    from dovetail.telemetry.log import say, warn

    keys = read_keys(network.api_key_file) if network.api_key_file else None
    if keys is None and network.host not in ("127.0.0.1", "localhost", "::1"):
        warn(
            f"{network.host} can be reached by others, and no API key is required", hint="--api-key-file FILE"
        )
    with ExitStack() as opened:
        listening = opened.enter_context(
            listen(network.host, network.port, certificate_of(network.certificate, network.key))
        )
        models = load_models(paths, settings)
        say(f"models: {', '.join(model.name for model in models)}")
        sections = []
        if tab is not None:
            sections.append(opened.enter_context(label_section(tab, models, listening.url, settings.device)))
        app = create_app(
            models,
            limits=limits,
            keys=keys,
            cors_origins=network.origins,
            host_names=network.names,
            sections=sections,
        )
        run(app, listening, drain_seconds=drain_seconds)


def _expect_what_labels_need(store: str | None, prompts: str | None, sampled: object) -> None:
    if store is None and (prompts or sampled):
        raise ConfigError("labelling needs a database", hint="name one: --store sqlite:///labels.db")
    if prompts is None and sampled:
        raise ConfigError(
            "--compare and --uncertain-first are for answers that are sampled here",
            hint="name the prompts to answer: --prompts prompts.jsonl",
        )


def api_key(
    file: Annotated[Path, typer.Argument(parser=path, help="File to which the key's hash is added.")],
    name: Annotated[str, typer.Argument(help="Name of the key's owner.")],
) -> None:
    """Make an API key. It is printed once; the file holds only its hash.

    dovetail api-key keys.txt alice
    dovetail serve runs/demo --api-key-file keys.txt
    """
    from dovetail.serving.keys import add_key

    typer.echo(add_key(file, name))
