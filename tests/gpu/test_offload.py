"""Models in host memory learn what models on the GPU learn; through NCCL, in groups of one process and of more.

The script is tried on a CPU with DOVETAIL_TEST_DEVICE=cpu, where nothing is offloaded but the same code runs.
"""

from __future__ import annotations

import copy
import gc
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from dovetail.batches import PackedBatch, pack
from dovetail.engine.hybrid import HybridEngine
from dovetail.engine.parity import check_parity
from dovetail.engine.sampling import Sampling
from dovetail.model.forward import language_model_loss
from dovetail.model.lora import add_lora
from dovetail.model.shards import is_offloaded, local
from dovetail.parallel.shard import shard_model, sharding_of
from dovetail.parallel.world import World, joined
from dovetail.stages import pipeline
from dovetail.training.optim import Ema, Optimizer
from dovetail.training.step import StepReport, Term, TokenBudget, gradient_step
from tests.parallel.group import new_store, run_all
from tests.parallel.test_training import OFFLOADED, hybrid, merged, metrics_of, zero
from tests.stages.runs import tiny_run

DEVICE = torch.device(os.environ.get("DOVETAIL_TEST_DEVICE", "cuda"))
NUM_DEVICES = torch.cuda.device_count() if DEVICE.type == "cuda" else 4
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(NUM_DEVICES == 0, reason="no GPU")]

WIDTH = 1024 if DEVICE.type == "cuda" else 32
"""Large enough that a gradient is still on its way to the host when the next line runs."""


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """A group of this process alone."""
    store = new_store()
    numbers = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": store.port}
    for name, value in numbers.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    with joined(DEVICE) as found:
        yield found


def made(dtype: torch.dtype, lora: bool) -> Any:
    """A model in host memory."""
    config = LlamaConfig(
        vocab_size=16 * WIDTH,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(config).to(dtype).train()
    return add_lora(model, rank=8, alpha=16, seed=0) if lora else model


def batch_of(seed: int) -> PackedBatch:
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(16 * WIDTH, (64,), generator=generator).tolist() for _ in range(12)]
    return pack(rows, [[i > 0 for i in range(64)] for _ in rows])


def steps(model: Any, *, micro_batches: int) -> tuple[list[StepReport], Optimizer, Ema]:
    """Three, of so many micro-batches; eps is large, so that a weight moves by its gradient and not by its sign."""
    optimizer = Optimizer(model, learning_rate=1.0, eps=1.0)
    ema = Ema(model, decay=0.9, optimizer=optimizer)
    reports = []
    for step in range(3):
        report = gradient_step(
            model,
            optimizer,
            [Term(batch_of(step), partial(language_model_loss, model))],
            max_grad_norm=1.0,
            budget=TokenBudget(12 * 64 // micro_batches),
            device=DEVICE,
            learning_rate=1.0,
        )
        ema.update()
        reports.append(report)
    return reports, optimizer, ema


def moved(after: dict[str, Tensor], before: dict[str, Tensor]) -> dict[str, Tensor]:
    """How far each weight went from where it was."""
    return {name: weight.cpu().float() - before[name].float() for name, weight in after.items()}


def expect_same_moves(found: dict[str, Tensor], expected: dict[str, Tensor], *, within: float) -> None:
    assert found.keys() == expected.keys()
    for name, move in expected.items():
        assert float((found[name] - move).norm()) <= within * float(move.norm()) + 1e-7, name


@pytest.mark.parametrize("micro_batches", [1, 4])
@pytest.mark.parametrize(
    ("stage", "dtype", "lora"),
    [
        (3, torch.bfloat16, False),
        (2, torch.bfloat16, False),
        (1, torch.bfloat16, False),
        (3, torch.float32, False),
        (3, torch.bfloat16, True),
    ],
)
def test_offloaded_steps_are_those_on_the_gpu(
    world: World, stage: int, dtype: torch.dtype, lora: bool, micro_batches: int
) -> None:
    """A gradient that is read before it has arrived would show in norm, weights and average."""
    plain = made(dtype, lora)
    before = {name: p.detach().clone() for name, p in plain.named_parameters() if p.requires_grad}
    offloaded = copy.deepcopy(plain)
    shard_model(offloaded, stage=stage, world=world, device=DEVICE, offload=True)
    reports, optimizer, ema = steps(offloaded, micro_batches=micro_batches)
    expected_reports, expected_optimizer, expected_ema = steps(plain.to(DEVICE), micro_batches=micro_batches)
    near = 1e-4 if dtype == torch.float32 else 1e-2
    for report, expected in zip(reports, expected_reports, strict=True):
        assert report.loss == pytest.approx(expected.loss, rel=near)
        assert report.grad_norm == pytest.approx(expected.grad_norm, rel=near)
    assert expected_reports[-1].loss < expected_reports[0].loss + 1  # it did not run away
    moves = moved(expected_optimizer.weights(), before)
    assert max(float(move.norm()) for move in moves.values()) > 0.001
    expect_same_moves(moved(optimizer.weights(), before), moves, within=5 * near)
    averages = {name: local(average) for name, average in ema.averages().items()}
    expect_same_moves(moved(averages, before), moved(expected_ema.averages(), before), within=5 * near)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="no GPU")
def test_what_is_offloaded_takes_no_memory_of_the_gpu(world: World) -> None:
    gc.collect()  # what earlier tests left is not to be freed in between
    before = torch.cuda.memory_allocated()  # cuBLAS keeps room for every stream that ever used it
    model = made(torch.bfloat16, lora=False)
    num_bytes = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    shard_model(model, stage=3, world=world, device=DEVICE, offload=True)
    optimizer = steps(model, micro_batches=2)[1]
    assert all(is_offloaded(weight) for weight in model.parameters())
    tensors = [slot for state in optimizer.state_dict()["parameters"].values() for slot in state.values()]
    assert {tensor.device.type for tensor in tensors} == {"cpu"}
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated() - before
    assert held < num_bytes / 2  # of weights alone; what is left is cuBLAS's own
    room = torch.cuda.memory_allocated()
    optimizer.offload()
    optimizer.restore()
    assert torch.cuda.memory_allocated() == room  # nothing to offload, nothing to bring back


def test_an_offloaded_state_goes_on_where_it_was(world: World) -> None:
    """What a checkpoint holds is written into masters, moments and averages in host memory, not into copies."""
    first, second = made(torch.bfloat16, lora=False), made(torch.bfloat16, lora=False)
    for model in (first, second):
        shard_model(model, stage=3, world=world, device=DEVICE, offload=True)
    _, optimizer, ema = steps(first, micro_batches=2)
    resumed = Optimizer(second, learning_rate=1.0, eps=1.0)
    resumed_ema = Ema(second, decay=0.9, optimizer=resumed)
    resumed.load_state_dict(optimizer.state_dict())
    resumed_ema.load_state_dict(ema.state_dict())
    for name, weight in optimizer.weights().items():
        assert torch.equal(resumed.weights()[name], weight), name
        assert torch.equal(local(resumed_ema.averages()[name]), local(ema.averages()[name])), name
    found, expected = (o.state_dict()["parameters"] for o in (resumed, optimizer))
    for name, slots in expected.items():
        for key, slot in slots.items():
            assert torch.equal(local(found[name][key]), local(slot)), (name, key)


@pytest.mark.parametrize("lora", [False, True])
def test_an_offloaded_model_generates_and_is_saved_as_it_is(world: World, lora: bool) -> None:
    plain = made(torch.float32, lora).eval()
    offloaded = copy.deepcopy(plain)
    shard_model(offloaded, stage=3, world=world, device=DEVICE, offload=True)
    weights = sharding_of(offloaded).unsharded
    engine = HybridEngine(sharding_of(offloaded).generation_model, device=DEVICE, weights=weights)
    prompts = [[5, 6, 7], [8, 9], [10] * 20]
    settings = Sampling(max_new_tokens=12, temperature=0.0)
    with engine.generating() as generate:
        found = [list(answer.token_ids) for answer in generate(prompts, settings, seeds=range(3))]
    check_parity(engine, prompts, trained=offloaded)
    saved = sharding_of(offloaded).for_saving()
    same = dict(plain.named_parameters())
    assert saved is not None
    assert all(torch.equal(weight, same[name]) for name, weight in saved.named_parameters())
    with HybridEngine(plain.to(DEVICE)).generating() as generate:
        assert found == [list(answer.token_ids) for answer in generate(prompts, settings, seeds=range(3))]


RUNS: list[tuple[int, dict[str, Any]]] = [
    (1, zero(3) | OFFLOADED),
    (2, zero(3) | OFFLOADED),
    (2, zero(3)),
    (4, hybrid(2)),
    (4, hybrid(3) | OFFLOADED),
]


@pytest.mark.parametrize(("size", "changes"), RUNS)
def test_whole_runs_come_to_what_one_gpu_comes_to(tmp_path: Path, size: int, changes: dict[str, Any]) -> None:
    """Losses and norms of stages 1 and 2; of PPO, whose draws may differ by rounding, that it comes to its end."""
    if size > NUM_DEVICES:
        pytest.skip(f"no {size} GPUs")
    several = {stage: {"micro_batch_tokens": 60, "batch_size": 8} for stage in ("sft", "reward", "ppo")}
    common = {"device": DEVICE.type, "precision": "fp32"}
    own = {"output_dir": str(tmp_path / "group")}
    run_all([(tiny_run(tmp_path, **merged(common, several, changes, own)), None)], size=size)
    pipeline.run(tiny_run(tmp_path, **merged(common, several, {"output_dir": str(tmp_path / "alone")})))
    found, expected_rows = metrics_of(tmp_path / "group"), metrics_of(tmp_path / "alone")
    assert (tmp_path / "group/ppo/model/model.safetensors").exists()
    for (_, row), (_, expected) in zip(found, expected_rows, strict=True):
        for key, value in row.items():
            if key.startswith(("sft/", "reward/")) and key.endswith(("loss", "grad_norm")):
                assert value == pytest.approx(expected[key], rel=2e-3, abs=2e-4), key
