"""Requests that join and leave a batch decoded by captured graphs, one draw ahead."""

from __future__ import annotations

import pytest
import torch

from dovetail.engine import HybridEngine, Sampling
from dovetail.engine.answers import Answer
from tests.engine.test_hybrid import prompts_of
from tests.engine.test_serving import Script, request
from tests.fakes import tiny_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


def test_requests_that_come_and_go_are_answered_as_if_alone() -> None:
    model = tiny_model(dtype=torch.float64).cuda()
    prompts, sampling = prompts_of(), Sampling(max_new_tokens=24, temperature=0.9)
    alone = []
    for index, prompt in enumerate(prompts):
        with HybridEngine(model).generating() as generate:
            alone.append(generate([prompt], sampling, seeds=[index])[0].token_ids)
    for options in ({"max_cache_tokens": 5 * 64}, {"max_running": 2}, {"max_prefill_tokens": 50}):
        answers = [request(index, prompt, sampling) for index, prompt in enumerate(prompts)]
        gone = request(99, [5] * 20, Sampling(max_new_tokens=400))

        def cancel(gone: Answer = gone) -> list[Answer]:
            gone.finish_reason = "cancelled"
            return []

        arrivals = {f"at_{3 * index}": lambda answer=answer: [answer] for index, answer in enumerate(answers)}
        source = Script(at_1=lambda gone=gone: [gone], at_40=cancel, **arrivals)
        with HybridEngine(model, **options).serving() as serve:  # type: ignore[arg-type]
            serve(source)
        assert [tuple(answer.token_ids) for answer in answers] == alone
        assert (gone.pages, source.loads[-1].num_pages) == ([], 0)
