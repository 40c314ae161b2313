"""Models divided over several processes generate what one process generates: tokens, and log-probabilities to float32.

The reference is the engine over the whole model in this process, which tests/engine compares with transformers.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from dovetail.engine.hybrid import HybridEngine
from tests.fakes import TINY
from tests.parallel.group import run_group
from tests.parallel.splitting import PROMPTS, SETTINGS, Case, Result, answers, made
from tests.stages.runs import tiny_run
from tests.tolerance import assert_near

FEW: tuple[Case, ...] = (
    ("llama", 2, 3, ""),
    ("gpt2", 2, 0, "lora"),
    ("gpt2", 2, 3, "wrong plan"),
    ("llama", 2, 0, "bytes"),
    ("opt", 2, 3, "whole"),
)
ALL: tuple[Case, ...] = (
    *((name, 2, 3, "") for name in TINY),
    *((name, 2, 1, "lora") for name in ("opt", "gpt2", "gpt-neox", "qwen3", "phi3")),
    ("one key head", 2, 0, ""),
    ("llama", 2, 0, "memory"),
)
ON_FOUR: tuple[Case, ...] = (
    ("qwen3", 2, 3, ""),
    *((name, 4, 3, "") for name in ("opt", "gpt2", "gpt-neox", "phi3")),
    ("llama", 4, 0, "lora"),
    ("llama", 2, 0, "idle"),
)
"""With one key head for two queries, four processes each have one that another has too."""


@cache
def together(cases: tuple[Case, ...], size: int) -> list[dict[str, Any]]:
    """What each process of a group came to."""
    codes, said = run_group(["tests.parallel.splitting", json.dumps(cases), "cpu"], size=size)
    assert codes == [0] * size, "\n".join(said)
    return [json.loads(text.splitlines()[-1]) for text in said]


@cache
def alone(name: str, special: str) -> Result:
    """What one process comes to."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = answers(HybridEngine(made(name, special)))
    torch.set_num_threads(threads)
    return found


def expect_equal(cases: tuple[Case, ...], case: Case, *, size: int) -> None:
    """All processes have the answers of one."""
    name, _, _, special = case
    ids, logprobs = alone(name, special)
    for found in together(cases, size):
        found_ids, found_logprobs = found[" ".join(map(str, case))][:2]
        assert found_ids == ids
        for row, expected in zip(found_logprobs, logprobs, strict=True):
            assert_near(torch.tensor(row), expected)


@pytest.mark.parametrize("case", FEW[:2], ids=str)
def test_a_model_in_two_parts_generates_what_it_does_whole(case: Case) -> None:
    expect_equal(FEW, case, size=2)


def test_the_parity_check_finds_a_plan_that_cuts_a_layer_wrongly() -> None:
    for found in together(FEW, 2):
        message = found["gpt2 2 3 wrong plan"]
        assert "GPT2LMHeadModel: generation and the plain forward" in message
        assert "The first layer that differs is transformer.h.0:" in message


def test_no_more_than_one_layer_is_whole_at_a_time() -> None:
    """Of OPT's: weights and biases of queries, keys, values, output, and two feed-forward layers."""
    assert [found["opt 2 3 whole"] for found in together(FEW, 2)] == [12, 12]


def test_a_token_brings_the_bytes_of_docs_scaling() -> None:
    layers, width, vocabulary, number, t = (
        2,
        32,
        2 * 136,
        4,
        1 / 2,
    )  # 258 tokens, padded to 136 in each process
    prompt, drawn = len(PROMPTS[0]), SETTINGS[0].max_new_tokens
    read = prompt + drawn - 1  # the last token is not fed
    expected = read * 2 * t * (2 * layers + 1) * width * number + drawn * number * t * vocabulary
    assert [found["llama 2 0 bytes"] for found in together(FEW, 2)] == [expected] * 2


@pytest.mark.slow
@pytest.mark.parametrize("case", ALL, ids=str)
def test_every_architecture_in_two_parts_generates_what_it_does_whole(case: Case) -> None:
    expect_equal(ALL, case, size=2)


@pytest.mark.slow
def test_processes_with_different_memory_admit_and_preempt_the_same_answers() -> None:
    preempted = [found["llama 2 0 memory"][2] for found in together(ALL, 2)]
    assert preempted[0] == preempted[1] > 0


@pytest.mark.slow
@pytest.mark.parametrize("case", ON_FOUR[:-1], ids=str)
def test_four_processes_generate_in_two_groups_or_one(case: Case) -> None:
    expect_equal(ON_FOUR, case, size=4)


@pytest.mark.slow
def test_a_group_needs_no_other_while_it_generates() -> None:
    busy, also_busy, idle, also_idle = (found["llama 2 0 idle"] for found in together(ON_FOUR, 4))
    assert idle is also_idle is None
    assert busy == also_busy
    assert busy[0] == alone("llama", "")[0]


@pytest.mark.slow
def test_a_number_of_processes_that_does_not_divide_the_model_is_told_once_before_anything_is_trained(
    tmp_path: Path,
) -> None:
    config = tiny_run(tmp_path, tensor_parallel={"generation": 3})
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    codes, said = run_group(["dovetail", "train", str(recipe)], size=3)
    assert sorted(codes) == [1, 1, 2]
    (told,) = (text for text in said if "hint" in text)
    assert "tensor_parallel.generation = 3: the model's 4 attention heads cannot be divided by 3" in told
    assert "hint: set tensor_parallel.generation to one of 1, 2, 4" in told
    assert not (tmp_path / "run/sft").exists()
