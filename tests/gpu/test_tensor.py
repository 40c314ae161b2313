"""Models divided over two GPUs, through NCCL and inside captured graphs, generate what one GPU generates."""

from __future__ import annotations

import json

import pytest
import torch

from dovetail.engine import HybridEngine
from tests.parallel.group import run_group
from tests.parallel.splitting import Case, answers, made
from tests.tolerance import assert_near

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no two GPUs")]

CASES: tuple[Case, ...] = (
    ("llama", 2, 3, ""),
    ("gpt2", 2, 1, "lora"),
    ("opt-post-norm", 2, 0, ""),
    ("gpt-neox", 2, 3, ""),
    ("phi3", 2, 3, "lora"),
    ("gemma2", 2, 0, ""),
    ("one key head", 2, 3, ""),
)


def test_two_gpus_generate_what_one_does() -> None:
    codes, said = run_group(["tests.parallel.splitting", json.dumps(CASES), "cuda"], size=2)
    assert codes == [0, 0], "\n".join(said)
    assert not any("cannot be captured" in text for text in said)
    found = [json.loads(text.splitlines()[-1]) for text in said]
    for case in CASES:
        ids, logprobs = answers(HybridEngine(made(case[0], case[3]).cuda()))
        for results in found:
            found_ids, found_logprobs = results[" ".join(map(str, case))]
            assert found_ids == ids, case
            for row, expected in zip(found_logprobs, logprobs, strict=True):
                assert_near(torch.tensor(row), expected)
