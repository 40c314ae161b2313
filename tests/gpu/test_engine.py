"""Generation on a GPU: captured graphs, kernels and the draw ahead, against transformers and the training forward."""

from __future__ import annotations

import gc
import random
import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from dovetail.batches import pack
from dovetail.engine import Completion, HybridEngine, Sampling
from dovetail.engine.parity import check_parity
from dovetail.model.forward import token_logprobs
from dovetail.model.lora import adapter_disabled, add_lora
from tests.fakes import TINY, tiny_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

RAGGED = (60, 61, 62, 3, 130, 1, 64)
DTYPES = (torch.float64, torch.float32)
SQUEEZED: tuple[dict[str, int], ...] = (
    {},
    {"max_cache_tokens": 5 * 64},
    {"max_running": 2, "max_prefill_tokens": 50},
)


@pytest.fixture(autouse=True)
def exact_products() -> Any:
    """float32 products in float32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def prompts_of(lengths: Sequence[int] = RAGGED) -> list[list[int]]:
    rng = random.Random(1)
    return [[rng.randrange(250) for _ in range(length)] for length in lengths]


def greedy_with_margins(model: Any, prompt: list[int], num_new: int) -> tuple[list[int], list[float]]:
    """Token by token over the whole sequence: ids, and by how much each was the best."""
    ids, margins = list(prompt), []
    for _ in range(num_new):
        with torch.no_grad():
            logits = model(torch.tensor([ids], device=model.device), use_cache=False).logits[0, -1]
        best = logits.double().topk(2)
        ids.append(int(best.indices[0]))
        margins.append(float(best.values[0] - best.values[1]))
    return ids[len(prompt) :], margins


def run(engine: HybridEngine, prompts: list[list[int]], sampling: Any, **options: Any) -> list[Completion]:
    with engine.generating() as generate:
        return generate(prompts, sampling, seeds=range(len(prompts)), **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", TINY)
def test_greedy_tokens_are_those_of_transformers(name: str, dtype: torch.dtype) -> None:
    model = tiny_model(name, dtype=dtype).cuda()
    prompts = prompts_of()
    expected = [greedy_with_margins(model, prompt, 24) for prompt in prompts]
    for options in SQUEEZED:
        engine = HybridEngine(model, **options)  # type: ignore[arg-type]
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # no falling back
            completions = run(engine, prompts, Sampling(max_new_tokens=24, temperature=0.0))
        assert (engine.counts.preempted > 0) == ("max_cache_tokens" in options)
        for completion, (ids, margins) in zip(completions, expected, strict=True):
            same = next(
                (i for i, (a, b) in enumerate(zip(completion.token_ids, ids, strict=True)) if a != b), None
            )
            assert same is None or (dtype == torch.float32 and margins[same] < 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", TINY)
def test_logprobs_are_those_of_the_training_forward(name: str, dtype: torch.dtype) -> None:
    model = tiny_model(name, dtype=dtype).cuda()
    prompts = prompts_of()
    completions = run(HybridEngine(model), prompts, Sampling(max_new_tokens=24, temperature=0.7))
    pairs = list(zip(prompts, completions, strict=True))
    batch = pack(
        [[*prompt, *c.token_ids] for prompt, c in pairs],
        [[False] * len(prompt) + [True] * len(c.token_ids) for prompt, c in pairs],
    ).to(torch.device("cuda"))
    with torch.no_grad():
        trained = token_logprobs(model, batch, temperature=0.7).logprobs_T[batch.mask_T].cpu()
    sampled = torch.tensor([logprob for completion in completions for logprob in completion.logprobs])
    if dtype == torch.float32:
        torch.testing.assert_close(sampled, trained, atol=1e-5, rtol=1e-5)
    else:
        assert float((sampled - trained).abs().mean()) < 0.05


@pytest.mark.parametrize(
    "options", [{"top_p": 0.9}, {"top_k": 5, "repetition_penalty": 1.3}, {"min_p": 0.1}, {}]
)
def test_an_answer_does_not_depend_on_what_runs_beside_it(options: dict[str, Any]) -> None:
    model = tiny_model().cuda()
    prompts, sampling = prompts_of(), Sampling(max_new_tokens=40, **options)
    together = run(HybridEngine(model), prompts, sampling)
    squeezed = run(HybridEngine(model, max_cache_tokens=5 * 64), prompts, sampling)
    few = run(HybridEngine(model, max_running=3), prompts, sampling)
    assert [c.token_ids for c in together] == [c.token_ids for c in squeezed] == [c.token_ids for c in few]
    for index, prompt in enumerate(prompts):
        with HybridEngine(model).generating() as generate:
            (alone,) = generate([prompt], sampling, seeds=[index])
        assert alone.token_ids == together[index].token_ids


def test_answers_to_one_prompt_share_its_pages_and_are_what_they_are_alone() -> None:
    model = tiny_model("qwen3").cuda()
    prompts = [prompt for prompt in prompts_of((200, 130, 70)) for _ in range(4)]
    engine, sampling = HybridEngine(model), Sampling(max_new_tokens=30)
    together = run(engine, prompts, sampling)
    assert engine.counts.shared_tokens == 3 * (192 + 128 + 64)
    for index, prompt in enumerate(prompts):
        with HybridEngine(model).generating() as generate:
            (alone,) = generate([prompt], sampling, seeds=[index])
        assert alone.token_ids == together[index].token_ids


def test_rows_join_and_leave_through_stops_limits_and_cancellation() -> None:
    model = tiny_model(dtype=torch.float32).cuda()
    prompts = prompts_of([5 + 3 * i for i in range(40)])
    free = run(HybridEngine(model), prompts, Sampling(max_new_tokens=60, temperature=0.0))
    stops = [(c.token_ids[7 + i],) if i % 3 == 0 else () for i, c in enumerate(free)]
    settings = [
        Sampling(max_new_tokens=1 + i if i % 3 == 1 else 60, temperature=0.0, stop_token_ids=stop)
        for i, stop in enumerate(stops)
    ]
    heard: dict[int, list[int]] = {i: [] for i in range(40)}

    def on_token(index: int, token_id: int, _: float) -> bool:
        heard[index].append(token_id)
        return index % 3 == 2 and len(heard[index]) == 1 + index

    found = run(HybridEngine(model, max_running=16), prompts, settings, on_token=on_token)
    for index, completion in enumerate(found):
        whole = list(free[index].token_ids)
        length = whole.index(stops[index][0]) + 1 if stops[index] else 1 + index
        assert list(completion.token_ids) == whole[:length] == heard[index]
        assert completion.finish_reason == ("stop", "length", "cancelled")[index % 3]


def test_weights_changed_in_place_between_two_blocks_are_used_by_the_second() -> None:
    model, prompts = tiny_model().cuda(), prompts_of((9, 70))
    engine, sampling = HybridEngine(model), Sampling(max_new_tokens=10, temperature=0.0)
    before = run(engine, prompts, sampling)
    model.load_state_dict(tiny_model(seed=9).state_dict())
    after = run(engine, prompts, sampling)
    fresh = run(HybridEngine(tiny_model(seed=9).cuda()), prompts, sampling)
    assert [c.token_ids for c in after] == [c.token_ids for c in fresh] != [c.token_ids for c in before]


def test_graphs_serve_later_blocks_until_the_model_has_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    from dovetail.engine.graphs import GraphDecoder

    captured: list[Any] = []
    capture = GraphDecoder._capture
    monkeypatch.setattr(
        GraphDecoder, "_capture", lambda self, key: (captured.append(key), capture(self, key))[1]
    )
    model, sampling = tiny_model().cuda(), Sampling(max_new_tokens=10, temperature=0.0)
    engine = HybridEngine(model)

    def found(lengths: Sequence[int]) -> list[tuple[int, ...]]:
        return [completion.token_ids for completion in run(engine, prompts_of(lengths), sampling)]

    first = found((9, 70, 130))
    num_captured = len(captured)
    assert num_captured
    in_the_way = torch.empty(2**20, device="cuda")  # the next arena lies elsewhere
    others, again = found((130, 9, 20)), found((9, 70, 130))
    assert (len(captured), again) == (num_captured, first)
    alone = run(HybridEngine(model), prompts_of((130, 9, 20)), sampling)
    assert others == [completion.token_ids for completion in alone]
    num_captured = len(captured)
    held = [parameter.data for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    for old in held:
        old.fill_(torch.nan)  # who reads there reads nonsense
    assert found((9, 70, 130)) == first
    assert len(captured) > num_captured
    del in_the_way


def test_adapters_generate_and_the_base_stays_as_it_was_to_the_bit() -> None:
    plain = tiny_model().cuda()
    before = {name: p.detach().clone() for name, p in plain.named_parameters()}
    prompts, sampling = prompts_of((9, 70)), Sampling(max_new_tokens=10, temperature=0.0)
    base = run(HybridEngine(plain), prompts, sampling)
    model = add_lora(plain, rank=4, alpha=8, seed=0)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator).cuda()
    engine = HybridEngine(model)
    for _ in range(3):
        adapted = run(engine, prompts, sampling)
        with adapter_disabled(model):
            assert [c.token_ids for c in run(engine, prompts, sampling)] == [c.token_ids for c in base]
    assert [c.token_ids for c in adapted] != [c.token_ids for c in base]
    for name, parameter in model.get_base_model().named_parameters():
        if "lora_" not in name:
            assert torch.equal(parameter, before[name.replace(".base_layer", "")])
    check_parity(engine, prompts_of((30, 60, 120)))


def test_memory_is_given_back_and_does_not_grow() -> None:
    model = tiny_model().cuda()
    engine, prompts = HybridEngine(model), prompts_of([50] * 64)
    gc.collect()  # what earlier tests left is not to be freed in between
    allocated = []
    for _ in range(4):
        run(engine, prompts, Sampling(max_new_tokens=100))
        torch.cuda.synchronize()
        allocated.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    assert allocated[1] == allocated[2] == allocated[3]
