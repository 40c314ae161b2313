"""The likeliest tokens at each place, against the logits of transformers."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from dovetail.engine import HybridEngine, Sampling
from dovetail.engine.scheduler import Answer
from dovetail.errors import GenerationError
from tests.engine.test_serving import Script, request
from tests.fakes import tiny_model

PROMPTS = ([5] * 20, [6] * 9, [7] * 70, [8] * 3)


def likeliest_by_hugging_face(answer: Answer, temperature: float) -> list[list[tuple[int, float]]]:
    """All tokens at each place of the answer, the likeliest first."""
    ids = [*answer.prompt, *answer.token_ids]
    with torch.no_grad():
        logits = tiny_model(dtype=torch.float64)(torch.tensor([ids]), use_cache=False).logits[0]
    found = []
    for place in range(len(answer.prompt) - 1, len(ids) - 1):
        top = (logits[place] / temperature).log_softmax(-1).sort(descending=True)
        found.append(list(zip(top.indices.tolist(), top.values.tolist(), strict=True)))
    return found


def serve(answers: Sequence[Answer]) -> None:
    with HybridEngine(tiny_model(dtype=torch.float64)).serving() as answer_all:
        answer_all(Script(at_0=lambda: answers[:2], at_4=lambda: answers[2:]))


def test_each_answer_gets_as_many_as_it_asked_for_whatever_runs_beside_it() -> None:
    counts = (3, 0, 20, 1)
    answers = [
        request(i, prompt, Sampling(max_new_tokens=12, temperature=0.7, top_logprobs=count))
        for i, (prompt, count) in enumerate(zip(PROMPTS, counts, strict=True))
    ]
    serve(answers)
    for answer, count in zip(answers, counts, strict=True):
        expected = likeliest_by_hugging_face(answer, 0.7)
        assert len(answer.top_logprobs) == (len(answer.token_ids) if count else 0)
        for place, (top, all_tokens) in enumerate(zip(answer.top_logprobs, expected, strict=False)):
            assert [token for token, _ in top] == [token for token, _ in all_tokens[:count]]
            assert [x for _, x in top] == pytest.approx([x for _, x in all_tokens[:count]], abs=1e-9)
            drawn = answer.token_ids[place], answer.logprobs[place]
            assert drawn in top or drawn[0] in [token for token, _ in all_tokens[count:]]


def test_tokens_that_cannot_be_drawn_are_left_out() -> None:
    answer = request(0, PROMPTS[0], Sampling(max_new_tokens=6, top_k=4, top_logprobs=20))
    serve([answer])
    for token_id, top in zip(answer.token_ids, answer.top_logprobs, strict=True):
        assert len(top) == 4
        assert token_id in [token for token, _ in top]
        assert sum(torch.tensor([x for _, x in top]).exp().tolist()) == pytest.approx(1)


@pytest.mark.parametrize("count", [-1, 21])
def test_other_counts_are_refused(count: int) -> None:
    with pytest.raises(GenerationError, match=f"top_logprobs = {count} cannot be used"):
        Sampling(max_new_tokens=1, top_logprobs=count)


@pytest.mark.filterwarnings("ignore:.*padded")
def test_models_that_take_the_padded_way_draw_the_same_with_and_without() -> None:
    drawn = []
    for count in (0, 3):
        with HybridEngine(tiny_model("bloom")).generating() as generate:
            drawn.append(generate(PROMPTS, Sampling(max_new_tokens=8, top_logprobs=count), seeds=range(4)))
    assert drawn[0] == drawn[1]
