"""One process of a group that trains divided models: one gradient step of each, and what it came to.

RANK=0 WORLD_SIZE=2 ... python -m tests.parallel.dividing '[["llama", 2, 0, ""], ...]' cpu FOLDER

A case: [model, processes that compute each layer together, ZeRO stage, what is special ("", "lora", "scalar",
"recomputed", "float32", "bytes" or "dropout")]. Printed is {case: what it came to}; the first process leaves
whole gradients in FOLDER, "<case>.safetensors".
"""

import hashlib
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from dovetail.batches import PackedBatch, SummedLoss, pack
from dovetail.model.dropout import disable_dropout
from dovetail.model.forward import language_model_loss, token_values
from dovetail.model.lora import add_lora
from dovetail.model.scalar import with_scalar_head
from dovetail.model.shards import local, shard_like, whole
from dovetail.model.slices import slice_of
from dovetail.parallel.grid import in_rows
from dovetail.parallel.shard import shard_model, sharding_of
from dovetail.parallel.world import World, joined
from dovetail.training.optim import Optimizer
from dovetail.training.step import Term, TokenBudget, gradient_step
from tests.fakes import tiny_model

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import traffic  # type: ignore[import-not-found]

Case = tuple[str, int, int, str]

ROWS = [[(7 * i + 3 * j) % 250 for j in range(length)] for i, length in enumerate((9, 4, 12, 7, 5))]
MOST_TOKENS = 20
"""Of a micro-batch: several of them, and not as many sequences in each."""


def batch() -> PackedBatch:
    """All tokens but the first of each sequence count."""
    return pack(ROWS, [[False] + [True] * (len(row) - 1) for row in ROWS])


def made(name: str, special: str) -> Any:
    """The model of a case, as one process has it; float64 unless the case says otherwise."""
    model: Any = tiny_model(name, dtype=torch.float32 if special == "float32" else torch.float64)
    if special != "dropout":
        disable_dropout(model)
    if special == "scalar":
        model = with_scalar_head(model, seed=1, pad_token_id=None)
    if special == "lora":
        model = add_lora(model, rank=4, alpha=8, seed=0)
        generator = torch.Generator().manual_seed(0)
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    model.train()
    if special == "recomputed":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def squares(model: Any, micro: PackedBatch) -> SummedLoss:
    """Of a scalar model's values."""
    values_T = token_values(model, micro)
    return SummedLoss(values_T[micro.mask_T].square().sum(), micro.mask_T.sum())


def result(case: Case, world: World, device: torch.device, folder: Path) -> dict[str, Any]:
    """Loss, norm, and a digest of the weights that all processes of a group have."""
    name, size, stage, special = case
    model = made(name, special)
    shard_model(model, stage=stage, world=in_rows(world, size), device=device)
    optimizer = Optimizer(model, learning_rate=1e-3)
    gradients: dict[str, Tensor] = {}
    step = optimizer.step

    def step_and_keep(scale: Tensor) -> None:
        """In the place of the optimiser's, once gradients are complete."""
        named, tensor_parallel = dict(model.named_parameters()), sharding_of(model).layout.tensor_parallel
        for key, gradient in optimizer.gradients().items():
            held = whole(shard_like(named[key], gradient))
            joined = held if tensor_parallel is None else tensor_parallel.whole(held, named[key])
            gradients[key] = joined.clone().cpu()
        step(scale)

    optimizer.step = step_and_keep  # type: ignore[method-assign]
    torch.manual_seed(sharding_of(model).world.rank)
    take = partial(
        gradient_step,
        model,
        optimizer,
        [Term(batch(), partial(squares if special == "scalar" else language_model_loss, model))],
        max_grad_norm=1.0,
        budget=TokenBudget(MOST_TOKENS),
        device=device,
        learning_rate=1e-3,
    )
    if special == "bytes":
        optimizer.step = step  # type: ignore[method-assign]
        with traffic.Traffic() as seen:
            take()
        return seen.received()  # type: ignore[no-any-return]
    report = take()
    if world.is_first:
        save_file(
            {k: v.contiguous() for k, v in gradients.items()}, folder / f"{named_after(case)}.safetensors"
        )
    return {"loss": report.loss, "norm": report.grad_norm, "replicas": digest(model)}


def digest(model: Any) -> str:
    """Of the weights, the rows that are here, that are not cut."""
    found = hashlib.sha256()
    for name, weight in model.named_parameters():
        note = slice_of(weight)
        assert note is not None
        if note.all_pieces is None:
            found.update(name.encode())
            found.update(local(weight).cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def named_after(case: Case) -> str:
    return " ".join(map(str, case))


def main(cases: list[Case], kind: torch.device, folder: Path) -> None:
    """Prints what all cases came to, in every process."""
    torch.set_num_threads(1)
    with joined(kind) as world:
        results = {named_after(case): result(case, world, world.device(kind), folder) for case in cases}
    sys.stdout.write(f"\n{json.dumps(results)}\n")


if __name__ == "__main__":
    main([tuple(case) for case in json.loads(sys.argv[1])], torch.device(sys.argv[2]), Path(sys.argv[3]))
