"""Models whose layers are divided over several processes learn what one process learns: every gradient.

The reference is transformers' own forward of each whole sequence alone in this process, and autograd.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.fakes import TINY
from tests.parallel.dividing import ROWS, Case, made, named_after
from tests.parallel.group import run_group
from tests.tolerance import assert_near

FEW: tuple[Case, ...] = (
    ("llama", 2, 0, ""),
    ("opt", 2, 0, "lora"),
    ("qwen3", 2, 3, ""),
    ("gpt2", 2, 1, "scalar"),
    ("opt", 2, 1, "dropout"),
    ("gpt2", 2, 0, "bytes"),
)
ALL: tuple[Case, ...] = (
    *((name, 2, 0, "") for name in TINY),
    *((name, 2, 1, "lora") for name in TINY),
    *((name, 2, 0, "scalar") for name in TINY),
    ("llama", 2, 2, "recomputed"),
    ("opt", 2, 0, "float32"),
    ("opt", 2, 0, "dropout"),
)
ON_FOUR: tuple[Case, ...] = (
    *((name, 4, 0, "") for name in ("opt", "gpt2", "gpt-neox")),
    ("gpt2", 4, 3, "lora"),
    *(("llama", 2, stage, "") for stage in range(4)),
    *(("qwen3", 2, stage, "lora") for stage in range(4)),
    ("opt", 2, 3, "scalar"),
    ("gemma3", 2, 2, "recomputed"),
    ("opt", 2, 0, "dropout"),
)

EXACT = ("opt", "opt-post-norm", "gpt2", "gpt-neox")
"""All in float64; transformers' RMSNorms compute in float32, and so does FSDP2 where it has anything to reduce."""

Found = list[dict[str, Any]]


class Groups:
    """What groups of processes came to, run when asked for the first time."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        self.folder = folder
        self._device = device
        self._found: dict[tuple[tuple[Case, ...], int], Found] = {}

    def found(self, cases: tuple[Case, ...], size: int) -> Found:
        if (cases, size) not in self._found:
            folder = self.folder / str(size)
            folder.mkdir(exist_ok=True)
            codes, said = run_group(
                ["tests.parallel.dividing", json.dumps(cases), self._device, str(folder)], size=size
            )
            assert codes == [0] * size, "\n".join(said)
            self._found[cases, size] = [json.loads(text.splitlines()[-1]) for text in said]
        return self._found[cases, size]


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> Groups:
    return Groups(tmp_path_factory.mktemp("divided"))


def by_definition(name: str, special: str) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss per target and all gradients: each sequence alone, through transformers' own forward."""
    model = made(name, special).double()
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row in ROWS:
        ids = torch.tensor([row])
        if special == "scalar":
            values = model.score(model.base_model(input_ids=ids, use_cache=False).last_hidden_state)[
                0, :-1, 0
            ]
            total = total + (values**2).sum()
        else:
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
            total = total - logits.log_softmax(-1).gather(1, ids[0, 1:, None]).sum()
        count += len(row) - 1
    loss = total / count
    loss.backward()
    grads = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    return loss.item(), grads


def expect_equal(groups: Groups, cases: tuple[Case, ...], case: Case, *, size: int) -> None:
    name, width, stage, special = case
    found = groups.found(cases, size)
    results = [process[named_after(case)] for process in found]
    replicas = [result["replicas"] for result in results]
    for first in range(0, size, width):
        assert len(set(replicas[first : first + width])) == 1, "whole weights differ within a group"
    assert len({(result["loss"], result["norm"]) for result in results}) == 1
    if special == "dropout":
        return
    dtype = torch.float64 if name in EXACT and (stage == 0 or size == width) else torch.float32
    if special == "float32":  # rounded in every operation of every layer, not once
        dtype = torch.float16
    loss, expected = by_definition(name, special)
    assert_near(torch.tensor(results[0]["loss"], dtype=torch.float64), loss, dtype=dtype)
    norm = sum(float((gradient**2).sum()) for gradient in expected.values()) ** 0.5
    assert_near(torch.tensor(results[0]["norm"], dtype=torch.float64), norm, dtype=dtype)
    gradients = load_file(groups.folder / str(size) / f"{named_after(case)}.safetensors")
    assert gradients.keys() == expected.keys()
    for key, gradient in gradients.items():
        assert_near(gradient, expected[key], dtype=dtype)


@pytest.mark.parametrize("case", FEW[:-1], ids=str)
def test_a_divided_model_has_the_gradients_of_the_whole(groups: Groups, case: Case) -> None:
    expect_equal(groups, FEW, case, size=2)


def test_a_step_receives_the_bytes_of_docs_scaling(groups: Groups) -> None:
    layers, width, number, t = 2, 32, 8, 1 / 2
    tokens = sum(map(len, ROWS))
    targets = tokens - len(ROWS)
    whole = [p for name, p in made("gpt2", "").named_parameters() if not name.endswith(CUT_IN_GPT2)]
    layers_one_way = 2 * t * 2 * layers * tokens * width * number
    ends = 2 * t * (tokens * width + targets * (width + 3)) * number
    expected = {
        "allreduce": 2 * layers_one_way + ends + 2 * t * number,  # and the gradient's norm
        "broadcast": t * sum(p.numel() for p in whole) * number,
    }
    assert [found["gpt2 2 0 bytes"] for found in groups.found(FEW, 2)] == [expected] * 2


CUT_IN_GPT2 = ("wte.weight", "c_attn.weight", "c_attn.bias", "c_fc.weight", "c_fc.bias", "c_proj.weight")


@pytest.mark.slow
@pytest.mark.parametrize("case", ALL, ids=str)
def test_every_architecture_divided_has_the_gradients_of_the_whole(groups: Groups, case: Case) -> None:
    expect_equal(groups, ALL, case, size=2)


@pytest.mark.slow
@pytest.mark.parametrize("case", ON_FOUR, ids=str)
def test_four_processes_divide_a_model_by_four_or_shard_its_halves(groups: Groups, case: Case) -> None:
    expect_equal(groups, ON_FOUR, case, size=4)
