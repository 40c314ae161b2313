"""The fused head against log-softmax of all logits."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, CohereConfig, GraniteConfig, PhiConfig

from dovetail.errors import ModelError
from dovetail.model import linear_logprobs as module
from dovetail.model.linear_logprobs import LMHead, head_of, linear_cross_entropy, linear_logprobs
from dovetail.model.scalar import scalar_model_from
from tests.fakes import PADDED, TINY, tiny_model
from tests.tolerance import assert_near

NUM_TOKENS, VOCABULARY, WIDTH = 11, 23, 7


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def random_case(*, bias=True, softcap=None, logit_scale=1.0, dtype=torch.float64):
    hidden = draw(NUM_TOKENS, WIDTH, seed=1, dtype=dtype).requires_grad_()
    weight = draw(VOCABULARY, WIDTH, seed=2, dtype=dtype).requires_grad_()
    bias_V = draw(VOCABULARY, seed=3, dtype=dtype).requires_grad_() if bias else None
    ids = torch.randint(0, VOCABULARY, (NUM_TOKENS,), generator=torch.Generator().manual_seed(4))
    return hidden, LMHead(weight, bias_V, softcap, logit_scale), ids


def by_definition(hidden, head, ids, temperature):
    logits = hidden @ head.weight_VD.T
    if head.bias_V is not None:
        logits = logits + head.bias_V
    logits = logits * head.logit_scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    probs = torch.softmax(logits / temperature, dim=-1)
    logprobs = torch.stack([probs[i, token].log() for i, token in enumerate(ids.tolist())])
    return logprobs, -(probs * probs.log()).sum(-1)


@pytest.mark.parametrize("chunk_tokens", [1, 4, 11, None])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("softcap", "logit_scale"), [(None, 1.0), (1.5, 1.0), (None, 0.25), (2.0, 3.0)])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_entropy_and_gradients_are_those_of_the_definition(
    chunk_tokens, bias, softcap, logit_scale, temperature
):
    hidden, head, ids = random_case(bias=bias, softcap=softcap, logit_scale=logit_scale)
    ours, entropy = linear_logprobs(
        hidden, head, ids, temperature=temperature, with_entropy=True, chunk_tokens=chunk_tokens
    )
    wanted, wanted_entropy = by_definition(hidden, head, ids, temperature)
    assert_near(ours, wanted)
    assert_near(entropy, wanted_entropy)
    assert not entropy.requires_grad
    inputs = [x for x in (hidden, head.weight_VD, head.bias_V) if x is not None]
    slope = draw(NUM_TOKENS, seed=5)
    for got, expected in zip(
        torch.autograd.grad(ours, inputs, slope), torch.autograd.grad(wanted, inputs, slope), strict=True
    ):
        assert_near(got, expected)


@pytest.mark.parametrize("chunk_tokens", [1, 4, None])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("softcap", "logit_scale"), [(None, 1.0), (1.5, 0.25)])
def test_cross_entropy_and_its_gradients_are_those_of_the_definition(
    chunk_tokens, bias, softcap, logit_scale
):
    hidden, head, ids = random_case(bias=bias, softcap=softcap, logit_scale=logit_scale)
    ours = linear_cross_entropy(hidden, head, ids, chunk_tokens=chunk_tokens)
    wanted = -by_definition(hidden, head, ids, 1.0)[0].sum()
    assert_near(ours, wanted)
    inputs = [x for x in (hidden, head.weight_VD, head.bias_V) if x is not None]
    expected = torch.autograd.grad(wanted * 0.3, inputs)
    for _ in range(2):  # what forward computed is still there for a second pass
        for got, right in zip(
            torch.autograd.grad(ours * 0.3, inputs, retain_graph=True), expected, strict=True
        ):
            assert_near(got, right)


def test_cross_entropy_in_half_precision_and_of_a_frozen_head():
    hidden, head, ids = random_case(dtype=torch.bfloat16)
    head.weight_VD.requires_grad_(False)
    exact = LMHead(head.weight_VD.double(), head.bias_V.double())
    wanted = -by_definition(hidden.double(), exact, ids, 1.0)[0].sum()
    found = linear_cross_entropy(hidden, head, ids)
    assert found.dtype == torch.float32
    assert_near(found, wanted)
    found.backward()
    assert head.weight_VD.grad is None
    assert hidden.grad.dtype == head.bias_V.grad.dtype == torch.bfloat16
    assert_near(hidden.grad, torch.autograd.grad(wanted, hidden)[0])


def test_cross_entropy_without_gradients_computes_none(monkeypatch):
    monkeypatch.setattr(module, "_slopes", lambda *_: pytest.fail("gradients nobody asked for"))
    hidden, head, ids = random_case()
    with torch.no_grad():
        found = linear_cross_entropy(hidden, head, ids)
    assert_near(found, -by_definition(hidden, head, ids, 1.0)[0].sum())


def test_huge_logits_do_not_overflow():
    logprobs, _ = linear_logprobs(torch.ones(1, 1), LMHead(torch.full((2, 1), 1e5)), torch.tensor([0]))
    assert_near(logprobs, [-math.log(2)], dtype=torch.bfloat16)  # float32 knows 100,000 to 0.008


def test_entropy_is_given_only_if_asked_for():
    assert linear_logprobs(*random_case())[1] is None


def test_a_frozen_head_gets_no_gradient_and_costs_none():
    hidden, head, ids = random_case()
    for weight in (head.weight_VD, head.bias_V):
        weight.requires_grad_(False)
    linear_logprobs(hidden, head, ids)[0].sum().backward()
    assert hidden.grad is not None
    assert head.weight_VD.grad is None


def test_frozen_hidden_states_still_train_the_head():
    hidden, head, ids = random_case()
    hidden.requires_grad_(False)
    linear_logprobs(hidden, head, ids)[0].sum().backward()
    assert hidden.grad is None
    assert head.weight_VD.grad is not None


def test_half_precision_weights_are_not_rounded_on_the_way_to_logprobs():
    hidden, head, ids = random_case(dtype=torch.bfloat16)
    exact = LMHead(head.weight_VD.double(), head.bias_V.double())
    wanted, _ = by_definition(hidden.double(), exact, ids, 1.0)
    logprobs, _ = linear_logprobs(hidden, head, ids)
    assert logprobs.dtype == torch.float32
    assert_near(logprobs, wanted)
    logprobs.sum().backward()
    assert hidden.grad.dtype == head.weight_VD.grad.dtype == torch.bfloat16
    wanted_grad = torch.autograd.grad(wanted.sum(), hidden)[0]
    assert_near(hidden.grad, wanted_grad)


def test_the_weight_gradient_of_many_chunks_is_summed_in_float32():
    ones = torch.ones(4096, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    logprobs, _ = linear_logprobs(ones, LMHead(weight), torch.zeros(4096, dtype=torch.long), chunk_tokens=1)
    logprobs.sum().backward()
    # bfloat16 would stop adding halves at 128.
    assert weight.grad.flatten().tolist() == [2048.0, -2048.0]


def test_memory_is_that_of_one_chunk_of_logits(monkeypatch):
    monkeypatch.setattr(module, "CHUNK_BYTES", 4 * VOCABULARY * 3)
    rows = []
    real = module._raw_logits
    monkeypatch.setattr(
        module, "_raw_logits", lambda hidden, *rest: rows.append(len(hidden)) or real(hidden, *rest)
    )
    hidden, head, ids = random_case()
    linear_logprobs(hidden, head, ids)[0].sum().backward()
    assert rows == [3, 3, 3, 2] * 2


def test_no_tokens_give_no_logprobs_and_zero_gradient():
    hidden, head, ids = random_case()
    logprobs, _ = linear_logprobs(hidden[:0], head, ids[:0])
    assert logprobs.shape == (0,)
    logprobs.sum().backward()
    assert head.weight_VD.grad.abs().max() == 0


def other_heads():
    shape = dict(
        vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    ids = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return {
        "phi": PhiConfig(**shape, **ids),  # a bias in the head
        "cohere": CohereConfig(**shape, **ids, logit_scale=0.0625),
        "granite": GraniteConfig(**shape, **ids, logits_scaling=8.0),
    }


@pytest.mark.parametrize("name", [*TINY, *PADDED, *other_heads()])
def test_the_head_of_every_family_gives_its_logits(name):
    if name in other_heads():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(other_heads()[name])
    else:
        model = tiny_model(name)
    model.to(torch.float64).eval()
    for parameter in model.get_output_embeddings().parameters():
        parameter.data.add_(draw(*parameter.shape))
    ids = torch.tensor([[3, 14, 15, 9, 2, 6]])
    hidden = model.base_model(ids, use_cache=False).last_hidden_state[0]
    assert_near(head_of(model).logits(hidden), model(ids).logits[0], dtype=torch.float32)


def test_a_model_without_a_head_is_refused():
    with pytest.raises(ModelError, match="no language-model head"):
        head_of(scalar_model_from(tiny_model(), seed=0, pad_token_id=0))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("chunk_tokens", [4, None])
def test_gpus_do_not_round_half_precision_logits(chunk_tokens):
    hidden, head, ids = random_case(dtype=torch.bfloat16)
    exact = LMHead(head.weight_VD.double(), head.bias_V.double())
    wanted, wanted_entropy = by_definition(hidden.double(), exact, ids, 1.0)
    there = hidden.detach().cuda().requires_grad_()
    weight = head.weight_VD.detach().cuda().requires_grad_()
    logprobs, entropy = linear_logprobs(
        there,
        LMHead(weight, head.bias_V.detach().cuda()),
        ids.cuda(),
        with_entropy=True,
        chunk_tokens=chunk_tokens,
    )
    assert_near(logprobs, wanted, dtype=torch.float32)
    assert_near(entropy, wanted_entropy, dtype=torch.float32)
    logprobs.sum().backward()
    wanted.sum().backward()
    assert_near(there.grad, hidden.grad, dtype=torch.bfloat16)
    assert_near(weight.grad, head.weight_VD.grad, dtype=torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("vocabulary", "chunk_tokens"), [(50, 3), (5000, 64), (50272, 17)])
@pytest.mark.parametrize(("temperature", "logit_scale"), [(1.0, 1.0), (0.7, 0.3)])
def test_the_kernels_compute_what_float64_does(dtype, vocabulary, chunk_tokens, temperature, logit_scale):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(60, 64, generator=generator).cuda().to(dtype).requires_grad_()
    weight = (torch.randn(vocabulary, 64, generator=generator) / 4).cuda().to(dtype).requires_grad_()
    bias = torch.randn(vocabulary, generator=generator).cuda().to(dtype).requires_grad_()
    ids = torch.randint(vocabulary, (60,), generator=generator).cuda()
    above = torch.randn(60, generator=generator).cuda()
    logprobs, entropy = linear_logprobs(
        hidden, LMHead(weight, bias, logit_scale=logit_scale), ids, temperature=temperature, with_entropy=True,
        chunk_tokens=chunk_tokens,
    )  # fmt: skip
    (logprobs * above).sum().backward()
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
    all_logprobs = ((exact[0] @ exact[1].T + exact[2]) * logit_scale / temperature).log_softmax(-1)
    expected = all_logprobs.gather(1, ids[:, None])[:, 0]
    (expected * above).sum().backward()
    torch.testing.assert_close(logprobs.double(), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        entropy.double(), -(all_logprobs.exp() * all_logprobs).sum(-1), atol=1e-4, rtol=1e-4
    )
    for found, wanted in zip((hidden, weight, bias), exact, strict=True):
        error = (found.grad.double() - wanted.grad).norm() / wanted.grad.norm()
        assert error < (1e-4 if dtype == torch.float32 else 1e-2)
