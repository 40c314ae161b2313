"""What is said of a reward model beside its accuracy."""

from typing import Any

import pytest
import torch

from dovetail.batches import pack_ranked
from dovetail.rlhf import evaluation
from tests.fakes import tiny_model


@pytest.mark.parametrize(("sign", "expected"), [(1.0, 1.0), (-1.0, -1.0)])
def test_the_length_of_prompts_hides_nothing_of_what_that_of_answers_explains(
    sign: float, expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, answers = (3, 400, 90, 7), (2, 9, 4)
    groups = [[[1] * (prompt + answer) for answer in answers] for prompt in prompts]
    batch = pack_ranked(groups, [[(1, 0, 0.0), (1, 2, 0.0)]] * len(prompts))
    scores_S = torch.tensor([sign * answer for _ in prompts for answer in answers])
    monkeypatch.setattr(evaluation, "scores_of", lambda *_: scores_S)
    model: Any = tiny_model()
    found = evaluation.reward_accuracy(model, batch, 10_000, torch.device("cpu"))
    assert found["score_length_correlation"] == pytest.approx(expected, abs=1e-5)
