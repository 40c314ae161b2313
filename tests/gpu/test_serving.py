"""Requests that join and leave a batch decoded by captured graphs, one draw ahead. No web framework is needed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dovetail.engine import HybridEngine, Sampling
from dovetail.engine.scheduler import Answer
from tests.engine.test_hybrid import prompts_of
from tests.engine.test_serving import Script, request
from tests.fakes import tiny_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


@pytest.fixture(autouse=True)
def exact_products() -> Any:
    """float32 products in float32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize(
    "options", [{"max_cache_tokens": 5 * 64}, {"max_running": 2}, {"max_prefill_tokens": 50}]
)
def test_requests_that_come_and_go_are_answered_as_if_alone(options: dict[str, int]) -> None:
    model = tiny_model(dtype=torch.float32).cuda()  # captured: there is no kernel for float64
    prompts, sampling = prompts_of(), Sampling(max_new_tokens=24, temperature=0.9)
    alone = []
    for index, prompt in enumerate(prompts):
        with HybridEngine(model).generating() as generate:
            alone.append(generate([prompt], sampling, seeds=[index])[0].token_ids)
    answers = [request(index, prompt, sampling) for index, prompt in enumerate(prompts)]
    gone = request(99, [5] * 20, Sampling(max_new_tokens=400))

    def cancel() -> list[Answer]:
        gone.finish_reason = "cancelled"
        return []

    arrivals = {f"at_{3 * index}": lambda answer=answer: [answer] for index, answer in enumerate(answers)}
    source = Script(at_1=lambda: [gone], at_40=cancel, **arrivals)
    with HybridEngine(model, **options).serving() as serve:  # type: ignore[arg-type]
        serve(source)
    assert [tuple(answer.token_ids) for answer in answers] == alone
    assert (gone.pages, source.loads[-1].num_pages) == ([], 0)
    assert len(gone.token_ids) < 60


def test_top_logprobs_are_those_of_the_plain_forward_whatever_runs_beside_them() -> None:
    model = tiny_model(dtype=torch.float32).cuda()
    counts = (3, 0, 20, 1, 0, 2, 5)
    answers = [
        request(i, prompt, Sampling(max_new_tokens=12, temperature=0.7, top_logprobs=count))
        for i, (prompt, count) in enumerate(zip(prompts_of(), counts, strict=True))
    ]
    with HybridEngine(model).serving() as serve:
        serve(Script(at_0=lambda: answers[:3], at_4=lambda: answers[3:]))
    for answer, count in zip(answers, counts, strict=True):
        assert len(answer.top_logprobs) == (len(answer.token_ids) if count else 0)
        ids = torch.tensor([answer.all_ids], device="cuda")
        with torch.no_grad():
            logits = model(ids, use_cache=False).logits[0, len(answer.prompt) - 1 : -1]
        logprobs = (logits / 0.7).log_softmax(-1).cpu()
        for top, place in zip(answer.top_logprobs, logprobs, strict=False):
            told = torch.tensor([x for _, x in top])
            torch.testing.assert_close(told, place.topk(count).values, atol=1e-5, rtol=1e-5)
            at_tokens = place[torch.tensor([token for token, _ in top])]
            torch.testing.assert_close(told, at_tokens, atol=1e-5, rtol=1e-5)
