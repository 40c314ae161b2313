"""Scores of a prompt's own tokens against transformers, in every architecture and however the logits are cut."""

from __future__ import annotations

import pytest
import torch

from dovetail.engine import prompt_scores as module
from dovetail.engine.hybrid import HybridEngine
from dovetail.engine.prompt_scores import prompt_scores
from tests.fakes import PADDED, TINY, tiny_model

IDS = [5, 80, 17, 17, 200, 3, 99, 41]
CPU = torch.device("cpu")


def expected(name: str) -> torch.Tensor:
    """Log-probabilities [T - 1, V] of what follows each token but the last."""
    with torch.no_grad():
        logits: torch.Tensor = tiny_model(name)(torch.tensor([IDS]), use_cache=False).logits
    return logits[0, :-1].double().log_softmax(-1)


@pytest.mark.parametrize("rows", [1, 3, 1000])
@pytest.mark.parametrize("name", TINY)
def test_log_probability_rank_and_likeliest_are_those_of_transformers(
    name: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_CHUNK_BYTES", rows * 4 * 258)
    scores = prompt_scores(tiny_model(name), IDS, count=3, device=CPU)
    for score, own, row in zip(scores, IDS[1:], expected(name), strict=True):
        assert score.logprob == pytest.approx(float(row[own]), rel=1e-4, abs=1e-4)
        assert score.rank == 1 + sum(float(other) > float(row[own]) for other in row)
        top = sorted(range(len(row)), key=lambda i: -float(row[i]))[:3]
        assert [i for i, _ in score.top_logprobs] == top
        assert [x for _, x in score.top_logprobs] == pytest.approx([float(row[i]) for i in top], rel=1e-4)


def test_none_of_the_likeliest_may_be_asked_for() -> None:
    scores = prompt_scores(tiny_model(), IDS, count=0, device=CPU)
    assert [list(score.top_logprobs) for score in scores] == [[]] * (len(IDS) - 1)
    assert prompt_scores(tiny_model(), IDS[:1], count=2, device=CPU) == []


@pytest.mark.parametrize("name", ["llama", *PADDED])
@pytest.mark.filterwarnings("ignore:.*padded")
def test_a_model_scores_while_it_serves(name: str) -> None:
    with HybridEngine(tiny_model(name), max_running=2, max_cache_tokens=256).serving() as serve:
        scores = serve.prompt_scores(IDS, 1)
    own = [float(row[i]) for row, i in zip(expected(name), IDS[1:], strict=True)]
    assert [score.logprob for score in scores] == pytest.approx(own, rel=1e-4, abs=1e-4)
