"""Models divided over two GPUs, through NCCL, have the gradients of transformers' own forward."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.parallel.dividing import Case
from tests.parallel.test_tensor_training import Groups, expect_equal

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no two GPUs")]

# Kernels compute float32's softmax, plain torch float64's.
CASES: tuple[Case, ...] = (
    ("opt", 2, 0, ""),
    ("opt", 2, 0, "float32"),
    ("llama", 2, 3, "float32"),
    ("llama", 2, 1, "lora"),
    ("gpt2", 2, 3, "scalar"),
    ("qwen3", 2, 2, "recomputed"),
    ("opt", 2, 1, "dropout"),
)


def test_two_gpus_have_the_gradients_of_the_whole_model(tmp_path: Path) -> None:
    groups = Groups(tmp_path, "cuda")
    for case in CASES:
        expect_equal(groups, CASES, case, size=2)
