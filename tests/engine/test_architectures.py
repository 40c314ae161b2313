"""Every class that transformers offers for causal language models: right, right and slower, or refused in a sentence.

Each is loaded from a folder, answers three prompts and reads them with their answers, beyond every window, chunk and
rope limit of its config. The reference is its plain forward of each text alone, with transformers' own attention.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dovetail.batches import pack
from dovetail.engine import HybridEngine, Sampling
from dovetail.errors import DovetailError
from dovetail.model import forward
from dovetail.model.forward import reading_of, token_logprobs
from dovetail.model.load import load_causal_lm
from tests.engine.architectures import EXTRA, MODEL_TYPES, UNMADE, tiny_architecture

PROMPT_TOKENS = (50, 9, 33)
NEW_TOKENS = 8
NATS = 1e-2
"""A wrong window, position or neighbour costs a random model far more; rounding costs a thousandth of it."""

ROWS = {name: (name, {}) for name in MODEL_TYPES} | EXTRA
PACKED = {
    "bitnet", "cohere", "cohere2", "ernie4_5", "exaone4", "gemma", "gemma2", "gemma3_text", "glm", "glm4", "gpt2",
    "gpt_neox", "granite", "llama", "llama, dynamic NTK", "ministral3", "mistral", "mixtral", "olmo2", "olmo3", "opt",
    "phi", "phi3", "phi3, longrope", "qwen2", "qwen3", "qwen3_moe", "seed_oss", "smollm3", "starcoder2",
}  # fmt: skip
"""The families that must keep the fast way."""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def table(pytestconfig: pytest.Config) -> Iterator[list[str]]:
    """What became of each row, printed at the end."""
    rows: list[str] = []
    yield rows
    capture: Any = pytestconfig.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        sys.stdout.write("\n".join(["", *rows, ""]))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("row", ROWS)
def test_a_model_is_right_or_right_and_slower_or_refused(row: str, tmp_path: Path, table: list[str]) -> None:
    tiny_architecture(*ROWS[row]).save_pretrained(tmp_path)
    forward._warn_of_padding.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            model = load_causal_lm(tmp_path, dtype=torch.float32, device="cpu")
        except DovetailError as refusal:
            message = str(refusal).partition("\n")[0]
            table.append(f"{row:28} refused: {message}")
            assert row not in PACKED
            assert "Traceback" not in message
            return
        way, farthest = answered_and_read(model)
    told = [str(w.message) for w in caught if type(model).__name__ in str(w.message)]
    table.append(f"{row:28} {way:16} off by {farthest:.0e} nats at most")
    assert farthest < NATS
    assert len(told) == {"packed/paged": 0}.get(way, len(set(told)))
    assert bool(told) == (way != "packed/paged")
    assert row not in PACKED or way == "packed/paged"


def answered_and_read(model: Any) -> tuple[str, float]:
    """How the model reads and answers, and nats by which any log-probability or greedy choice is off."""
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(5, 60, (length,), generator=generator).tolist() for length in PROMPT_TOKENS]
    engine = HybridEngine(model)
    with engine.generating() as generate:
        answers = generate(prompts, Sampling(max_new_tokens=NEW_TOKENS, temperature=0.0), seeds=range(3))
    rows = [[*prompt, *answer.token_ids] for prompt, answer in zip(prompts, answers, strict=True)]
    batch = pack(rows, [[False] + [True] * (len(row) - 1) for row in rows])
    with torch.no_grad():
        read = token_logprobs(model, batch).logprobs_T.split([len(row) for row in rows])
    farthest = 0.0
    for prompt, answer, row, read_T in zip(prompts, answers, rows, read, strict=True):
        logits_TV = logits_alone(model, row)
        ids_T1 = torch.tensor(row[1:])[:, None]
        plain_T = logits_TV.log_softmax(-1).gather(1, ids_T1)[:, 0]
        short_T = logits_TV.max(-1).values - logits_TV.gather(1, ids_T1)[:, 0]
        drawn_A = torch.tensor(answer.logprobs)
        first = len(prompt) - 1
        gaps = [(read_T[1:] - plain_T).abs(), (drawn_A - plain_T[first:]).abs(), short_T[first:]]
        farthest = max(farthest, *(float(gap.max()) for gap in gaps))
    way = engine.way()
    return f"{reading_of(model).way}/{'paged' if way.shape else way.slow}", farthest


@torch.no_grad()
def logits_alone(model: Any, row: list[int]) -> torch.Tensor:
    """Logits of one text by a copy of the model that never heard of us, but for its last token."""
    twin = type(model)._from_config(model.config, attn_implementation="eager").eval()
    twin.load_state_dict(model.state_dict())
    uncached = {"use_cache": False} if "use_cache" in inspect.signature(twin.forward).parameters else {}
    logits: torch.Tensor = twin(input_ids=torch.tensor([row]), **uncached).logits[0, :-1].float()
    return logits


def test_the_list_of_what_is_left_out_is_true() -> None:
    assert not set(UNMADE) & set(MODEL_TYPES)
    assert all(reason for reason in UNMADE.values())
