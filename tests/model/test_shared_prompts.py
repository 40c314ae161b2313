"""Shared prompts that are computed once against the same sequences computed one by one."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from dovetail.batches import PackedBatch, SummedLoss, pack, share_prompts
from dovetail.model import shared_prompts
from dovetail.model.attention import AttentionCall, PackedLayout
from dovetail.model.forward import (
    can_share_prompts,
    hidden_states,
    language_model_loss,
    last_hidden_states,
    last_scores,
    token_logprobs,
    token_values,
)
from dovetail.model.lora import add_lora
from dovetail.model.scalar import scalar_model_from
from dovetail.model.shared_prompts import SharedPromptLayout
from dovetail.training.optim import build_optimizer
from dovetail.training.step import StepReport, Term, TokenBudget, gradient_step
from tests.fakes import TINY, tiny_model
from tests.tolerance import assert_all_near, assert_near

GROUPS = {
    "ragged": [(6, (3, 1, 7)), (1, (2, 5)), (9, (4,))],
    "one answer each": [(5, (3,)), (2, (6,))],
    "equal": [(4, (3, 3, 3)), (4, (3, 3, 3))],
    "one group": [(8, (1, 1, 1, 1))],
}
"""The lengths of prompts and of the answers to each."""


def exact_model(name: str) -> Any:
    """A tiny model in float64 throughout: RMS norms, which round to float32 inside, are written out."""
    model = tiny_model(name, dtype=torch.float64)
    for norm in model.modules():
        if type(norm).__name__.endswith("RMSNorm"):
            epsilon = getattr(norm, "variance_epsilon", None) or norm.eps
            offset = 1.0 if "Gemma" in type(norm).__name__ else 0.0
            norm.forward = partial(rms_norm, norm, epsilon, offset)
    return model


def rms_norm(norm: Any, epsilon: float, offset: float, x: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + epsilon).rsqrt() * (norm.weight + offset)


def separate(groups: list[tuple[int, tuple[int, ...]]]) -> tuple[PackedBatch, list[int]]:
    """Each prompt with each of its answers, and the length of the prompt of each."""
    generator = torch.Generator().manual_seed(0)

    def draw(length: int) -> list[int]:
        return torch.randint(0, 256, (length,), generator=generator).tolist()

    sequences, masks, prompts = [], [], []
    for prompt_length, answer_lengths in groups:
        prompt = draw(prompt_length)
        for length in answer_lengths:
            sequences.append(prompt + draw(length))
            masks.append([False] * prompt_length + [True] * length)
            prompts.append(prompt_length)
    return pack(sequences, masks), prompts


def both(groups: list[tuple[int, tuple[int, ...]]]) -> tuple[PackedBatch, PackedBatch]:
    """The batch that computes each prompt once, and the same without."""
    batch, prompts = separate(groups)
    return share_prompts(batch, prompts), batch


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    """The gradients of a loss for all weights that have one."""
    learnt = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(learnt.values()), allow_unused=True)
    return {name: g for name, g in zip(learnt, found, strict=True) if g is not None}


def expect_same(
    model: Any, read: Callable[[Any, PackedBatch], Tensor], batches: tuple[PackedBatch, PackedBatch]
) -> None:
    """The numbers and all gradients of a forward are those of the separate sequences."""
    results = []
    for batch in batches:
        numbers = read(model, batch)
        slope = torch.linspace(-1, 1, numbers.numel(), dtype=numbers.dtype).view(numbers.shape)
        results.append({"numbers": numbers.detach(), **gradients(model, (numbers * slope).sum())})
    assert len(results[0]) > 1
    assert_all_near(results[0], results[1])


def logprobs_of(model: Any, batch: PackedBatch) -> Tensor:
    return token_logprobs(model, batch, temperature=0.7).logprobs_T


def tokens_read(model: Any, run: Callable[[], object]) -> list[int]:
    """How many tokens each forward of the backbone reads."""
    counts: list[int] = []
    hook = model.base_model.register_forward_pre_hook(
        lambda _, __, kwargs: counts.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    run()
    hook.remove()
    return counts


@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("name", TINY)
def test_logprobs_and_all_gradients_are_those_of_separate_sequences(name, groups):
    expect_same(exact_model(name), logprobs_of, both(groups))


@pytest.mark.parametrize("read", [token_values, last_scores, last_hidden_states, hidden_states])
@pytest.mark.parametrize("name", ["opt", "opt-post-norm", "qwen3", "mistral", "gemma2"])
def test_critics_and_reward_models_read_what_they_read_of_separate_sequences(name, read):
    model = scalar_model_from(exact_model(name), seed=1, pad_token_id=257)
    expect_same(model, read, both(GROUPS["ragged"]))


@pytest.mark.parametrize("name", ["opt", "llama", "mistral"])
def test_adapters_learn_what_they_learn_from_separate_sequences(name):
    model = add_lora(exact_model(name), rank=4, alpha=8, seed=0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += (
                0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)).double()
            )
    expect_same(model, logprobs_of, both(GROUPS["ragged"]))


def test_a_model_reads_each_prompt_once():
    shared, plain = both(GROUPS["ragged"])
    model = tiny_model("llama")
    assert tokens_read(model, lambda: logprobs_of(model, shared)) == [6 + 11 + 1 + 7 + 9 + 4]
    assert tokens_read(model, lambda: logprobs_of(model, plain)) == [plain.num_tokens]


def test_a_batch_in_which_no_neighbours_share_a_prompt_is_read_as_it_is():
    _, plain = both(GROUPS["one answer each"])
    model = exact_model("llama")
    none_shared = replace(plain, shared_lengths=(0,) * plain.num_sequences)
    assert not can_share_prompts(model, none_shared)
    assert_near(logprobs_of(model, none_shared), logprobs_of(model, plain))


def test_a_class_that_cannot_be_packed_reads_separate_sequences():
    model = tiny_model("bloom", dtype=torch.float64)
    shared, plain = both(GROUPS["ragged"])
    with pytest.warns(RuntimeWarning, match="padded"):
        assert_near(logprobs_of(model, shared), logprobs_of(model, plain))


def test_a_rope_that_depends_on_the_length_shares_prompts_among_short_sequences_alone():
    model = tiny_model("llama")
    shared, _ = both(GROUPS["ragged"])
    assert can_share_prompts(model, shared)
    rope = model.model.rotary_emb
    rope.rope_type = "dynamic"
    rope.original_max_seq_len = shared.max_length
    assert can_share_prompts(model, shared)
    rope.original_max_seq_len = shared.max_length - 1
    assert not can_share_prompts(model, shared)


def step_of(model: Any, batch: PackedBatch, tokens: int) -> tuple[StepReport, dict[str, Tensor]]:
    """One plain gradient step: its report and the weights after it."""

    def loss(micro: PackedBatch) -> SummedLoss:
        return language_model_loss(model, micro)

    optimizer = build_optimizer(model, learning_rate=1e-2)
    report = gradient_step(
        model,
        optimizer,
        [Term(batch, loss)],
        max_grad_norm=1.0,
        budget=TokenBudget(tokens),
        device=torch.device("cpu"),
        learning_rate=1e-2,
    )
    return report, {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize(("tokens", "read"), [(1000, [38]), (24, [17, 21]), (11, None), (1, None)])
def test_a_step_does_not_depend_on_how_groups_are_cut(tokens, read):
    shared, plain = both(GROUPS["ragged"])
    model = exact_model("llama")
    counts = tokens_read(model, lambda: step_of(model, shared, tokens))
    if read is not None:
        assert sorted(counts) == read
    one, weights = step_of(exact_model("llama"), shared, tokens)
    other, wanted = step_of(exact_model("llama"), plain, 1000)
    assert_near(one.grad_norm, other.grad_norm)
    assert_near(one.loss, other.loss)
    assert_all_near(weights, wanted)


def flash_by_definition(
    bounds: Any, query: Tensor, key: Tensor, scaling: float | None
) -> list[tuple[slice, slice, Tensor]]:
    """(queries, keys, scores [H, Q, K] with those that are not allowed at minus infinity) of each packed sequence."""
    found = []
    groups = query.shape[1] // key.shape[1]
    cu_q, cu_k = bounds.cu_queries.tolist(), bounds.cu_keys.tolist()
    for s in range(len(cu_q) - 1):
        asking, asked = slice(cu_q[s], cu_q[s + 1]), slice(cu_k[s], cu_k[s + 1])
        assert asking.stop - asking.start <= bounds.longest_query
        assert asked.stop - asked.start <= bounds.longest_key
        keys = key[asked].repeat_interleave(groups, dim=1)
        scores = torch.einsum("qhk,shk->hqs", query[asking], keys) * (scaling or query.shape[-1] ** -0.5)
        if bounds.is_causal:
            scores = scores.masked_fill(torch.ones(scores.shape[1:]).triu(1).bool(), -torch.inf)
        found.append((asking, asked, scores))
    return found


def flash_forward(bounds, query, key, value, scaling):
    groups = query.shape[1] // key.shape[1]
    out, sums = torch.zeros_like(query), query.new_zeros(query.shape[1], len(query))
    for asking, asked, scores in flash_by_definition(bounds, query, key, scaling):
        out[asking] = torch.einsum(
            "hqs,shk->qhk", scores.softmax(-1), value[asked].repeat_interleave(groups, dim=1)
        )
        sums[:, asking] = scores.logsumexp(-1)
    return out, sums


def flash_backward(bounds, grad, inputs, out, sums, scaling):
    """The equations of FlashAttention-2 (arXiv:2307.08691, algorithm 2) with the probabilities from the sums given."""
    query, key, value = inputs
    groups, scale = query.shape[1] // key.shape[1], scaling or query.shape[-1] ** -0.5
    found = [torch.zeros_like(x) for x in inputs]
    for asking, asked, scores in flash_by_definition(bounds, query, key, scaling):
        chances = (scores - sums[:, asking, None]).exp()
        delta = (grad[asking] * out[asking]).sum(-1).T[..., None]
        values = value[asked].repeat_interleave(groups, dim=1)
        slopes = chances * (torch.einsum("qhk,shk->hqs", grad[asking], values) - delta) * scale
        keys = key[asked].repeat_interleave(groups, dim=1)
        found[0][asking] = torch.einsum("hqs,shk->qhk", slopes, keys)
        for column, part in ((1, torch.einsum("hqs,qhk->shk", slopes, query[asking])),
                             (2, torch.einsum("hqs,qhk->shk", chances, grad[asking]))):  # fmt: skip
            found[column][asked] = part.unflatten(1, (-1, groups)).sum(2)
    return found


@pytest.fixture
def flash(monkeypatch):
    """Flash attention by its equations, in float64 on the CPU."""
    monkeypatch.setattr(shared_prompts, "flash_can", lambda *_: True)
    monkeypatch.setattr(shared_prompts._FlashBounds, "forward", flash_forward)
    monkeypatch.setattr(shared_prompts._FlashBounds, "backward", flash_backward)


@pytest.mark.usefixtures("flash")
@pytest.mark.parametrize("groups", [GROUPS["ragged"], GROUPS["equal"], GROUPS["one group"]])
@pytest.mark.parametrize("num_key_heads", [1, 2, 4])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_two_joined_calls_of_flash_attention_are_attention_to_prompt_and_answer(
    groups, num_key_heads, scaling
):
    shared, plain = both(groups)
    layout = SharedPromptLayout(shared)
    generator = torch.Generator().manual_seed(0)
    parts = [
        torch.randn(
            1, heads, len(layout.kept_U), 8, generator=generator, dtype=torch.float64
        ).requires_grad_()
        for heads in (4, num_key_heads, num_key_heads)
    ]
    call = AttentionCall(scaling=scaling)
    out = layout.attend(*parts, call)
    whole = PackedLayout.of(plain).attend(*(x[:, :, layout.row_T] for x in parts), call)
    wanted = whole[:, layout.kept_U]
    assert_near(out, wanted)
    slope = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    for one, other in zip(
        torch.autograd.grad(out, parts, slope), torch.autograd.grad(wanted, parts, slope), strict=True
    ):
        assert_near(one, other)


@pytest.mark.usefixtures("flash")
@pytest.mark.parametrize("name", ["opt", "llama", "qwen3", "gemma3"])
def test_models_learn_the_same_through_joined_calls(name):
    expect_same(exact_model(name), logprobs_of, both(GROUPS["ragged"]))


def test_activations_computed_again_give_the_same_gradients():
    batches = both(GROUPS["ragged"])
    model = exact_model("llama")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    expect_same(model, logprobs_of, batches)
