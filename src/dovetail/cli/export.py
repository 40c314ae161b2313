"""`dovetail export`: one model of a run, or an adapter, as a plain Hugging Face folder.

Responsible for: finding the model, merging adapters, writing the folder. Not responsible for: the format of
model folders and checkpoints (model/load.py, runs/checkpoint.py).
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from dovetail.cli.user_paths import path as as_path
from dovetail.config.load import check, read_recipe
from dovetail.config.model import ModelConfig
from dovetail.config.run import RunConfig
from dovetail.errors import ModelError
from dovetail.runs.run_models import model_folder
from dovetail.text.model_folder import adapter_in

if TYPE_CHECKING:
    import torch

    from dovetail.text.model_folder import AdapterFolder

Which = Literal["sft", "reward", "ppo", "dpo", "ema", "best"]
Checkpoint = Literal["newest", "best"]


def export(
    path: Annotated[
        str, typer.Argument(help="A run folder, a model folder, or a folder with a peft adapter.")
    ],
    to: Annotated[Path, typer.Argument(parser=as_path, help="Folder to write; must not exist.")],
    which: Annotated[
        Which | None,
        typer.Option(help="Model of a run. By default ppo, else dpo, else sft.", show_default=False),
    ] = None,
    from_checkpoint: Annotated[
        Checkpoint | None,
        typer.Option(
            help="From a checkpoint of the stage, finished or not: the newest, or the one that was best on "
            "held-out rows.",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[
        Literal["bf16", "fp16", "fp32"], typer.Option(help="Precision of the written weights.")
    ] = "bf16",
) -> None:
    """Write a model that any Hugging Face program can load, with adapters merged, tokenizer and chat template.

    dovetail export runs/opt-13b my-chat-model
    dovetail export runs/opt-13b reward --which reward --dtype fp32
    dovetail export runs/opt-13b half-way --which sft --from-checkpoint newest
    """
    if to.exists():
        raise ModelError(f"{to} exists already", hint="give a new folder, or remove it first")
    import torch  # here and not above: help must not wait for it

    precision = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    from dovetail.model.load import expect_rows_for, save_model
    from dovetail.text.chat_format import ChatFormat

    if from_checkpoint is not None:
        model, tokenizer = from_run_checkpoint(Path(path).expanduser(), which, from_checkpoint)
    else:
        model, tokenizer = finished(Path(path).expanduser(), path, which, precision)
    expect_rows_for(tokenizer, model, path)
    chat = ChatFormat(tokenizer)
    save_model(model, chat.tokenizer, to, dtype=precision, stop_token_ids=chat.stop_token_ids)
    typer.echo(f"written: {to}")


def finished(folder: Path, name: str, which: Which | None, dtype: "torch.dtype") -> tuple[Any, Any]:
    """Load model and tokenizer of a finished stage, a model folder or an adapter folder."""
    if (adapter := adapter_in(folder)) is not None:
        return merged_adapter(adapter, dtype)
    if which is None:
        return loaded(model_folder(name), dtype)
    from dovetail.runs.run_folder import RunFolder

    model = RunFolder(folder).model(which)
    if not model.is_dir():
        raise ModelError(
            f"{folder} has no finished {which} model",
            hint=f"finish it: dovetail train {folder}/config.yaml, or add --from-checkpoint newest",
        )
    return loaded(str(model), dtype)


def loaded(path: str, dtype: "torch.dtype") -> tuple[Any, Any]:
    """Load a causal LM or reward model with its tokenizer."""
    from dovetail.model.load import is_reward_model

    model = ModelConfig(path=path)
    return _scalar(model, dtype, seed=0) if is_reward_model(path) else _causal_lm(model, dtype)


def merged_adapter(adapter: "AdapterFolder", dtype: "torch.dtype") -> tuple[Any, Any]:
    """Load the adapter's base model, merge the adapter in, and load the adapter's tokenizer, or else the base's."""
    from dovetail.model.adapter import with_adapter
    from dovetail.model.lora import merge
    from dovetail.text.tokenizer import load_tokenizer

    base = ModelConfig(path=adapter.base, revision=adapter.revision)
    model, _ = _scalar(base, dtype, seed=0) if adapter.is_scalar else _causal_lm(base, dtype)
    tokenizer = load_tokenizer(adapter.folder)
    return merge(with_adapter(model, adapter.folder)), tokenizer


def from_run_checkpoint(folder: Path, which: Which | None, checkpoint: Checkpoint) -> tuple[Any, Any]:
    """Load the model of a stage from its newest or its best checkpoint."""
    from dovetail.runs.checkpoint import Checkpoints
    from dovetail.runs.run_folder import RunFolder
    from dovetail.training.weights import load_trained

    run = RunFolder(folder)
    if which is None:
        later: tuple[Which, ...] = ("ppo", "dpo")
        which = next((stage for stage in later if any(run.checkpoints(stage).glob("step-*"))), "sft")
    if which not in ("sft", "reward", "ppo", "dpo"):
        raise ModelError(f"{which} cannot be taken from a checkpoint", hint="--which sft, reward, ppo or dpo")
    checkpoints = Checkpoints(run.checkpoints(which))
    found = checkpoints.latest() if checkpoint == "newest" else checkpoints.best()
    if found is None:
        rated = " with an evaluation right before it" if checkpoint == "best" else ""
        raise ModelError(
            f"{run.checkpoints(which)} has no checkpoint{rated}",
            hint="checkpoints come every save_every steps, evaluations every eval_every",
        )
    step, state = found
    config = check(*read_recipe(run.config))
    model, tokenizer = _beginning(run, config, which)
    load_trained(model, state["engine"]["actor"] if which == "ppo" else state["model"])
    typer.echo(f"{which} after step {step}", err=True)
    return model, tokenizer


def _beginning(run: Any, config: RunConfig, which: Which) -> tuple[Any, Any]:
    """Load what the stage began with: base weights, and fresh adapters where it trains them."""
    import torch

    from dovetail.model.lora import add_lora

    settings = config.actor if which != "reward" else config.reward_start()
    after_sft = which in ("ppo", "dpo") or (which == "reward" and config.reward.start_from == "sft")
    start = settings
    if after_sft and run.is_done("sft"):
        start = start.model_copy(update={"path": str(run.model("sft")), "revision": None})
        if which != "reward":  # with the template that stage 1 learned
            start = start.model_copy(update={"chat_template": None})
    if which == "reward":
        model, tokenizer = _scalar(start, torch.float32, seed=config.seed)
    else:
        model, tokenizer = _causal_lm(start, torch.float32)
    if settings.lora is not None:
        lora = settings.lora
        model = add_lora(
            model, rank=lora.rank, alpha=lora.alpha, dropout=0.0, target_modules=lora.target_modules, seed=0
        )
    return model, tokenizer


def _causal_lm(settings: ModelConfig, dtype: "torch.dtype") -> tuple[Any, Any]:
    from dovetail.model.load import load_causal_lm

    return load_causal_lm(settings.path, dtype=dtype, **_place(settings)), _tokenizer(settings)


def _scalar(settings: ModelConfig, dtype: "torch.dtype", *, seed: int) -> tuple[Any, Any]:
    from dovetail.model.load import load_scalar_model

    tokenizer = _tokenizer(settings)
    pad = tokenizer.pad_token_id
    model = load_scalar_model(settings.path, dtype=dtype, seed=seed, pad_token_id=pad, **_place(settings))
    return model, tokenizer


def _tokenizer(settings: ModelConfig) -> Any:
    from dovetail.text.tokenizer import load_tokenizer

    source = settings.model_dump(include={"revision", "trust_remote_code", "chat_template"})
    return load_tokenizer(settings.path, **source)


def _place(settings: ModelConfig) -> dict[str, Any]:
    """Return the device and the version to load."""
    return {"device": "cpu", **settings.model_dump(include={"revision", "trust_remote_code"})}
