"""`dovetail serve` and `dovetail api-key`: finished models behind OpenAI's API, with a web chat.

Responsible for: the flags. Not responsible for: the server (serving/).
"""

from pathlib import Path
from typing import Annotated

import typer

_LIMITS = "Limits"
_NETWORK = "Network"
_PATHS = "Run folders, model folders, LoRA adapters, .gguf files or hub names; NAME=PATH names one."

Paths = Annotated[list[str], typer.Argument(metavar="PATH...", help=_PATHS)]
Host = Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all.", rich_help_panel=_NETWORK)]
Port = Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.", rich_help_panel=_NETWORK)]
KeyFile = Annotated[
    Path | None,
    typer.Option(
        help="Ask for a key that this file has the hash of; see dovetail api-key.",
        rich_help_panel=_NETWORK,
        show_default=False,
    ),
]
Origins = Annotated[
    list[str] | None,
    typer.Option(
        help="A web page's origin that may call this server; may be repeated.",
        rich_help_panel=_NETWORK,
        show_default=False,
    ),
]
Device = Annotated[str, typer.Option(help="cuda, cpu, or auto.")]
Running = Annotated[int, typer.Option(min=1, help="Answers of one model decoded together.")]
CacheTokens = Annotated[
    int, typer.Option(min=64, help="Tokens of prompts and answers that each model keeps in memory.")
]
DrainSeconds = Annotated[
    float, typer.Option(min=0, help="How long answers under way may take after SIGTERM.")
]
Waiting = Annotated[
    int, typer.Option(min=0, help="Answers that may wait; more get 429.", rich_help_panel=_LIMITS)
]
BodyBytes = Annotated[int, typer.Option(min=1, help="Largest request.", rich_help_panel=_LIMITS)]
PromptTokens = Annotated[
    int | None,
    typer.Option(min=1, help="Longest prompt.", rich_help_panel=_LIMITS, show_default="the context"),
]
NewTokens = Annotated[
    int | None,
    typer.Option(min=1, help="Longest answer.", rich_help_panel=_LIMITS, show_default="the context"),
]
Choices = Annotated[int, typer.Option(min=1, help="Most answers to one request.", rich_help_panel=_LIMITS)]
PerMinute = Annotated[
    float | None,
    typer.Option(
        min=0.01,
        help="Requests of one key, or of one address where no keys are asked for.",
        rich_help_panel=_LIMITS,
        show_default="no limit",
    ),
]


def serve(
    paths: Paths,
    host: Host = "127.0.0.1",
    port: Port = 8000,
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
    drain_seconds: DrainSeconds = 60,
) -> None:
    """Serve models to any OpenAI client, and a chat page to browsers.

      dovetail serve runs/demo
      dovetail serve before=HuggingFaceTB/SmolLM2-135M after=runs/smollm2 --port 8080

    A run folder stands for all its finished chat models: ppo, ppo-ema, sft.
    """
    from dovetail.serving.app import create_app  # here and not above: these import torch
    from dovetail.serving.gate import RequestLimits
    from dovetail.serving.keys import read_keys
    from dovetail.serving.served_model import EngineSettings, load_models
    from dovetail.serving.server import run
    from dovetail.telemetry.log import say, warn

    keys = read_keys(api_key_file) if api_key_file else None
    if keys is None and host not in ("127.0.0.1", "localhost", "::1"):
        warn(f"{host} can be reached by others, and no key is asked for", hint="--api-key-file FILE")
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
    models = load_models(paths, settings)
    say(f"models: {', '.join(model.name for model in models)}")
    app = create_app(models, limits=limits, keys=keys, cors_origins=cors_origin or ())
    run(app, host=host, port=port, drain_seconds=drain_seconds)


def api_key(
    file: Annotated[Path, typer.Argument(help="File that the key's hash is added to.")],
    name: Annotated[str, typer.Argument(help="Whose key it is.")],
) -> None:
    """Make an API key. It is printed once; the file holds only its hash.

    dovetail api-key keys.txt alice
    dovetail serve runs/demo --api-key-file keys.txt
    """
    from dovetail.serving.keys import add_key

    typer.echo(add_key(file, name))
