"""Generation against transformers' own, one prompt at a time, and against the training forward."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

from dovetail.batches import pack
from dovetail.engine import Completion, HybridEngine, Sampling
from dovetail.errors import GenerationError
from dovetail.model.forward import token_logprobs
from tests.fakes import TINY, tiny_model

RAGGED = (60, 61, 62, 3, 130, 1, 64)  # three outgrow their page together: five pages are too few


def prompts_of(lengths: Sequence[int] = RAGGED) -> list[list[int]]:
    rng = random.Random(1)
    return [[rng.randrange(250) for _ in range(length)] for length in lengths]


def hf_greedy(model: PreTrainedModel, prompt: list[int], num_new: int) -> list[int]:
    out = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=num_new,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=257,
    )
    return [int(i) for i in out[0, len(prompt) :]]


def run(
    model: Any, prompts: list[list[int]], sampling: Any, *, seed: int = 0, **options: Any
) -> list[Completion]:
    with HybridEngine(model, **options).generating() as generate:
        return generate(prompts, sampling, seeds=range(seed, seed + len(prompts)))


@pytest.mark.parametrize("name", TINY)
def test_greedy_tokens_are_those_of_transformers_for_ragged_prompts_even_after_preemption(name: str) -> None:
    model = tiny_model(name, dtype=torch.float64)
    prompts = prompts_of()
    expected = [hf_greedy(model, prompt, 24) for prompt in prompts]
    for options in (
        {},
        {"max_cache_tokens": 5 * 64},
        {"max_running": 2, "max_prefill_tokens": 50},
        {"max_running": 1, "max_prefill_tokens": 50},
    ):
        engine = HybridEngine(model, **options)  # type: ignore[arg-type]
        with engine.generating() as generate:
            completions = generate(
                prompts, Sampling(max_new_tokens=24, temperature=0.0), seeds=range(len(prompts))
            )
        assert [list(completion.token_ids) for completion in completions] == expected
        assert (engine.counts.preempted > 0) == ("max_cache_tokens" in options)


def test_greedy_tokens_are_right_while_a_long_prompt_is_still_being_read() -> None:
    """Its pages lie between those of answers that decode already, and between those of some that have left."""
    model = tiny_model()
    prompts = prompts_of((70, 400, 3, 65, 300, 130, 2, 350))
    settings = [Sampling(max_new_tokens=2 + 9 * (i % 3), temperature=0.0) for i in range(len(prompts))]
    with HybridEngine(model, max_running=3, max_prefill_tokens=50).generating() as generate:
        completions = generate(prompts, settings, seeds=range(len(prompts)))
    for prompt, completion in zip(prompts, completions, strict=True):
        assert list(completion.token_ids) == hf_greedy(model, prompt, len(completion.token_ids))


@pytest.mark.parametrize("options", [{"max_cache_tokens": 5 * 64}, {"max_running": 1}])
@pytest.mark.parametrize("name", TINY)
def test_logprobs_are_those_of_the_training_forward(name: str, options: dict[str, int]) -> None:
    model = tiny_model(name)
    prompts = prompts_of()
    completions = run(model, prompts, Sampling(max_new_tokens=24, temperature=0.7), **options)
    batch = pack(
        [[*prompt, *c.token_ids] for prompt, c in zip(prompts, completions, strict=True)],
        [[False] * len(p) + [True] * len(c.token_ids) for p, c in zip(prompts, completions, strict=True)],
    )
    with torch.no_grad():
        trained = token_logprobs(model, batch, temperature=0.7).logprobs_T[batch.mask_T]
    sampled = torch.tensor([logprob for completion in completions for logprob in completion.logprobs])
    torch.testing.assert_close(sampled, trained, atol=1e-5, rtol=1e-5)


def test_an_answer_does_not_depend_on_what_runs_beside_it() -> None:
    model = tiny_model(dtype=torch.float64)
    prompts, sampling = prompts_of(), Sampling(max_new_tokens=24, top_p=0.95)
    together = run(model, prompts, sampling)
    engine = HybridEngine(model, max_cache_tokens=5 * 64)
    with engine.generating() as generate:
        squeezed = generate(prompts, sampling, seeds=range(len(prompts)))
        assert engine.counts.preempted > 0
        for index, prompt in enumerate(prompts):
            (alone,) = generate([prompt], sampling, seeds=[index])
            assert alone.token_ids == together[index].token_ids == squeezed[index].token_ids


@pytest.mark.parametrize("name", TINY)
def test_answers_to_one_prompt_share_its_pages_and_are_what_they_are_alone(name: str) -> None:
    model = tiny_model(name, dtype=torch.float64)
    prompts = [prompt for prompt in prompts_of((200, 130, 70)) for _ in range(3)]
    sampling = Sampling(max_new_tokens=20)
    alone = [run(model, [prompt], sampling, seed=index)[0] for index, prompt in enumerate(prompts)]
    for options in ({}, {"max_cache_tokens": 9 * 64}, {"max_prefill_tokens": 90}, {"max_running": 2}):
        engine = HybridEngine(model, **options)  # type: ignore[arg-type]
        with engine.generating() as generate:
            together = generate(prompts, sampling, seeds=range(len(prompts)))
        assert [c.token_ids for c in together] == [c.token_ids for c in alone]
        assert engine.counts.shared_tokens > 0
        if not options:
            assert engine.counts.shared_tokens == 2 * (192 + 128 + 64)


def test_sampling_really_samples_and_follows_the_models_distribution() -> None:
    model, prompt, num = tiny_model(dtype=torch.float64), [65, 66, 67], 4000
    with torch.no_grad():
        exact = (model(torch.tensor([prompt])).logits[0, -1] / 0.5).softmax(-1)
    with HybridEngine(model, max_running=num).generating() as generate:
        drawn = generate([prompt] * num, Sampling(max_new_tokens=1, temperature=0.5), seeds=range(num))
    counts = Counter(completion.token_ids[0] for completion in drawn)
    likely = [int(i) for i in (exact * num > 10).nonzero()]
    assert len(likely) > 5
    rest = 1 - float(exact[likely].sum())
    cells = [(counts[i], num * float(exact[i])) for i in likely]
    cells.append((num - sum(counts[i] for i in likely), num * rest))
    statistic = sum((seen - wanted) ** 2 / wanted for seen, wanted in cells if wanted > 0)
    degrees = len(cells) - 1
    assert statistic < degrees + 5 * (2 * degrees) ** 0.5


def test_other_seeds_give_other_answers_and_equal_seeds_equal_ones() -> None:
    model, prompt = tiny_model(), [65, 66, 67]
    with HybridEngine(model).generating() as generate:
        first, second, again = generate([prompt] * 3, Sampling(max_new_tokens=12), seeds=[1, 2, 1])
    assert first.token_ids == again.token_ids != second.token_ids


def test_requests_keep_their_own_settings_stops_and_limits() -> None:
    model = tiny_model(dtype=torch.float64)
    prompts = prompts_of((5, 9, 12))
    free = [hf_greedy(model, prompt, 30) for prompt in prompts]
    stop = free[1][7]
    settings = [
        Sampling(max_new_tokens=30, temperature=0.0),
        Sampling(max_new_tokens=30, temperature=0.0, stop_token_ids=(stop,)),
        Sampling(max_new_tokens=4, temperature=0.0),
    ]
    whole, stopped, short = run(model, prompts, settings)
    assert (list(whole.token_ids), whole.finish_reason) == (free[0], "length")
    assert (list(stopped.token_ids), stopped.finish_reason) == (free[1][: free[1].index(stop) + 1], "stop")
    assert (list(short.token_ids), short.finish_reason) == (free[2][:4], "length")


def test_cancelling_one_answer_leaves_its_neighbours_as_they_were() -> None:
    model = tiny_model(dtype=torch.float64)
    prompts = prompts_of((70, 80, 90, 5))
    expected = [hf_greedy(model, prompt, 50) for prompt in prompts]
    heard: dict[int, list[int]] = {index: [] for index in range(4)}

    def on_token(index: int, token_id: int, logprob: float) -> bool:
        assert logprob <= 0
        heard[index].append(token_id)
        return index in (0, 2) and len(heard[index]) == 6

    with HybridEngine(model).generating() as generate:
        sampling = Sampling(max_new_tokens=50, temperature=0.0)
        completions = generate(prompts, sampling, seeds=range(4), on_token=on_token)
    assert [c.finish_reason for c in completions] == ["cancelled", "length", "cancelled", "length"]
    assert [list(c.token_ids) for c in completions] == [
        expected[0][:6],
        expected[1],
        expected[2][:6],
        expected[3],
    ]
    assert [list(c.token_ids) for c in completions] == list(heard.values())


def test_stop_strings_end_an_answer_through_the_engine() -> None:
    model, prompt = tiny_model(dtype=torch.float64), [65, 66, 67]
    free = hf_greedy(model, prompt, 20)

    def spelled(ids: Sequence[int]) -> str:
        return "".join(f"<{i}>" for i in ids)

    sampling = Sampling(max_new_tokens=20, temperature=0.0, stop_strings=(f"{free[6]}><{free[7]}>",))
    with HybridEngine(model).generating() as generate:
        (completion,) = generate([prompt], sampling, seeds=[0], decode_text=spelled)
    assert (list(completion.token_ids), completion.finish_reason) == (free[:8], "stop")


def test_weights_changed_between_two_blocks_are_used_by_the_second() -> None:
    model, prompt = tiny_model(dtype=torch.float64), [65, 66, 67, 68]
    engine, sampling = HybridEngine(model), Sampling(max_new_tokens=10, temperature=0.0)
    with engine.generating() as generate:
        before = generate([prompt], sampling, seeds=[0])[0]
    model.load_state_dict(tiny_model(seed=9, dtype=torch.float64).state_dict())
    with engine.generating() as generate:
        after = generate([prompt], sampling, seeds=[0])[0]
    assert list(after.token_ids) == hf_greedy(model, prompt, 10) != list(before.token_ids)


def test_a_peft_model_generates_with_its_adapter_or_without_it_when_disabled() -> None:
    base_ids = hf_greedy(tiny_model(dtype=torch.float64), [65, 66, 67], 12)
    model = get_peft_model(
        tiny_model(dtype=torch.float64), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), "default"
    )
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    sampling = Sampling(max_new_tokens=12, temperature=0.0)
    with HybridEngine(model).generating() as generate:
        adapted = generate([[65, 66, 67]], sampling, seeds=[0])[0]
        with model.disable_adapter():
            plain = generate([[65, 66, 67]], sampling, seeds=[0])[0]
    assert list(plain.token_ids) == base_ids
    merged = model.merge_and_unload()
    assert list(adapted.token_ids) == hf_greedy(merged, [65, 66, 67], 12) != base_ids


def test_modes_and_attention_are_restored_also_after_an_exception() -> None:
    model = tiny_model("opt")
    model.train()
    model.model.decoder.layers[1].eval()
    before = {name: module.training for name, module in model.named_modules()}
    attention = model.config._attn_implementation
    engine = HybridEngine(model)

    def explode(*_: object) -> bool:
        raise KeyError("from the callback")

    with engine.generating() as generate:
        assert not any(module.training for module in model.modules())
        generate([[1, 2]], Sampling(max_new_tokens=2), seeds=[0])
    for _ in range(2):  # the engine is usable again, too
        with pytest.raises(KeyError, match="from the callback"), engine.generating() as generate:
            generate([[1, 2]], Sampling(max_new_tokens=2), seeds=[0], on_token=explode)
        assert {name: module.training for name, module in model.named_modules()} == before
        assert model.config._attn_implementation == attention


def test_dropout_is_off_while_generating_in_a_model_that_trains() -> None:
    model = tiny_model("opt", dtype=torch.float64)
    expected = hf_greedy(model, [65, 66, 67], 10)
    model.train()
    assert (
        list(run(model, [[65, 66, 67]], Sampling(max_new_tokens=10, temperature=0.0))[0].token_ids)
        == expected
    )


def test_generation_leaves_no_gradient_and_no_global_randomness_behind() -> None:
    model = tiny_model()
    state = torch.get_rng_state()
    run(model, prompts_of(), Sampling(max_new_tokens=5))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_infinite_value_of_one_sequence_stays_out_of_those_that_reuse_its_pages() -> None:
    model = tiny_model(dtype=torch.float64)
    expected = hf_greedy(model, [5, 6, 7], 8)
    model.get_input_embeddings().weight.data[99] = float("inf")
    sampling = Sampling(max_new_tokens=8, temperature=0.0)
    with HybridEngine(model).generating() as generate:
        generate([[99] * 30], Sampling(max_new_tokens=1, temperature=0.0), seeds=[0])
        assert list(generate([[5, 6, 7]], sampling, seeds=[0])[0].token_ids) == expected


def test_answers_beyond_the_context_are_cut_off_with_one_warning() -> None:
    model, sampling = tiny_model(), Sampling(max_new_tokens=50)
    context = model.config.max_position_embeddings
    with HybridEngine(model).generating() as generate:
        with pytest.warns(UserWarning, match=f"the model's context of {context} tokens"):
            completions = generate([[1] * (context - 3)] * 2, sampling, seeds=[0, 1])
        again = generate([[1] * (context - 3)], sampling, seeds=[0])  # a second warning would be an error
    assert [len(c.token_ids) for c in (*completions, *again)] == [3, 3, 3]
    assert {c.finish_reason for c in completions} == {"length"}


def test_answers_beyond_the_cache_are_cut_off_and_longer_prompts_refused() -> None:
    with HybridEngine(tiny_model(), max_cache_tokens=64).generating() as generate:
        with pytest.warns(UserWarning, match="the KV cache of 64 tokens"):
            (completion,) = generate([[1] * 60], Sampling(max_new_tokens=50), seeds=[0])
        assert len(completion.token_ids) == 4
        with pytest.raises(GenerationError, match="the prompt has 64 tokens, the KV cache holds 64"):
            generate([[1] * 64], Sampling(max_new_tokens=50), seeds=[0])


def test_a_bad_request_is_refused_before_anything_runs() -> None:
    heard: list[object] = []
    with HybridEngine(tiny_model()).generating() as generate:
        with pytest.raises(GenerationError, match="request 1: the prompt is empty"):
            generate(
                [[1], []], Sampling(max_new_tokens=2), seeds=[0, 1], on_token=lambda *args: heard.append(args)
            )
        assert heard == []
        assert generate([], Sampling(max_new_tokens=2), seeds=[]) == []


def test_generate_does_not_outlive_its_block() -> None:
    with HybridEngine(tiny_model()).generating() as generate:
        pass
    with pytest.raises(AssertionError, match="outlived"):
        generate([[1]], Sampling(max_new_tokens=1), seeds=[0])
