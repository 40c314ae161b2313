"""Packed attention against attention by definition, one query at a time in float64."""

import math
from types import SimpleNamespace

import pytest
import torch

from dovetail.batches import pack
from dovetail.errors import ModelError
from dovetail.model import attention
from dovetail.model.attention import AttentionCall, PackedLayout, packed_attention, use_packed_attention
from dovetail.model.forward import why_not_packed
from tests.fakes import PADDED, TINY, tiny_model
from tests.tolerance import assert_near

LENGTHS = {"ragged": (5, 1, 9, 3), "equal": (4, 4, 4), "one": (11,)}
NUM_HEADS, NUM_KEY_HEADS, WIDTH = 4, 2, 8


def layout_of(lengths):
    return PackedLayout.of(pack([[0] * n for n in lengths], [[False] * n for n in lengths]))


def random_inputs(num_tokens, dtype=torch.float64, *, num_key_heads=NUM_KEY_HEADS):
    generator = torch.Generator().manual_seed(num_tokens)

    def draw(heads):
        # Laid out as in the models: [1, T, H, K] in memory, seen as [1, H, T, K].
        drawn = torch.randn(1, num_tokens, heads, WIDTH, generator=generator, dtype=dtype)
        return drawn.transpose(1, 2).requires_grad_()

    return draw(NUM_HEADS), draw(num_key_heads), draw(num_key_heads)


def by_definition(inputs, lengths, *, scaling, window=None, softcap=None):
    """Each token looks at the last `window` tokens of its own sequence, itself included."""
    query, key, value = (x[0] for x in inputs)
    rows = []
    start = 0
    for length in lengths:
        for t in range(start, start + length):
            first = max(start, t + 1 - window) if window else start
            for head in range(NUM_HEADS):
                key_head = head // (NUM_HEADS // len(key))
                scores = key[key_head, first : t + 1] @ query[head, t] * scaling
                if softcap:
                    scores = softcap * torch.tanh(scores / softcap)
                weights = scores.exp() / scores.exp().sum()
                rows.append(weights @ value[key_head, first : t + 1])
        start += length
    return torch.stack(rows).view(1, sum(lengths), NUM_HEADS, WIDTH)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize("softcap", [None, 0.7])
def test_packed_attention_and_its_gradient_are_those_of_the_definition(lengths, window, softcap):
    inputs = random_inputs(sum(lengths))
    slope = torch.randn(
        1, sum(lengths), NUM_HEADS, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    ours = layout_of(lengths).attend(*inputs, AttentionCall(0, 0.3, window, softcap))
    wanted = by_definition(inputs, lengths, scaling=0.3, window=window, softcap=softcap)
    assert_near(ours, wanted)
    for got, expected in zip(
        torch.autograd.grad(ours, inputs, slope), torch.autograd.grad(wanted, inputs, slope), strict=True
    ):
        assert_near(got, expected)


def test_without_a_scale_scores_are_divided_by_the_root_of_the_head_width():
    lengths = LENGTHS["ragged"]
    inputs = random_inputs(sum(lengths))
    for softcap in (None, 0.7):
        ours = layout_of(lengths).attend(*inputs, AttentionCall(softcap=softcap))
        assert_near(ours, by_definition(inputs, lengths, scaling=1 / math.sqrt(WIDTH), softcap=softcap))


def test_padding_goes_there_and_back():
    layout = layout_of((2, 1, 3))
    x = torch.arange(6.0)[None, None, :, None]
    padded = layout.padded(x)
    assert padded.shape == (3, 1, 3, 1)
    rows = padded[:, 0, :, 0].tolist()
    assert [rows[0][:2], rows[1][:1], rows[2]] == [[0.0, 1.0], [2.0], [3.0, 4.0, 5.0]]
    assert layout.packed(padded).flatten().tolist() == x.flatten().tolist()


def test_sequences_of_one_length_are_not_copied():
    query, *_ = random_inputs(12)
    layout = layout_of((4, 4, 4))
    assert layout.padded(query).data_ptr() == query.data_ptr()


def test_other_sequences_cannot_matter_even_if_they_are_poisoned():
    inputs = random_inputs(7)
    poisoned = [x.detach().clone() for x in inputs]
    for x in poisoned:
        x[:, :, 3:] = float("nan")
    layout = layout_of((3, 4))
    clean = layout.attend(*inputs, AttentionCall(scaling=1.0))
    dirty = layout.attend(*poisoned, AttentionCall(scaling=1.0))
    assert_near(dirty[:, :3], clean[:, :3])


def test_any_layout_decides_what_attention_is():
    query, key, value = random_inputs(3)
    seen = {}
    layout = SimpleNamespace(attend=lambda *given: seen.update(call=given[3]) or given[0])
    out, weights = packed_attention(
        None, query, key, value, None, layout=layout, scaling=2.0, sliding_window=5
    )
    assert out is query
    assert weights is None
    assert seen == {"call": AttentionCall(layer=0, scaling=2.0, window=5, softcap=None)}


def test_a_call_without_a_layout_says_how_to_call():
    model = tiny_model("llama")
    use_packed_attention(model)
    with pytest.raises(ModelError, match=r"without a `layout`") as caught:
        model(torch.tensor([[1, 2]]))
    assert "set_attn_implementation" in caught.value.hint


def test_a_term_that_packing_does_not_know_is_refused():
    query, key, value = random_inputs(3)
    with pytest.raises(ModelError, match="s_aux"):
        packed_attention(torch.nn.Identity(), query, key, value, None, layout=layout_of((3,)), s_aux=query)


@pytest.mark.parametrize("name", TINY)
def test_the_tiny_models_can_be_packed(name):
    assert why_not_packed(tiny_model(name)) is None


def test_what_cannot_be_packed_is_told():
    assert "keeps its own attention" in why_not_packed(tiny_model(*PADDED))
    model = tiny_model("mistral")
    model.config.layer_types = ["full_attention", "linear_attention"]
    assert "linear_attention" in why_not_packed(model)


def flash_forward(
    query, key, value, *places, scale, window_size_left, window_size_right, is_causal, **options
):
    """torch's operator, by definition."""
    bounds, bounds_of_keys, longest, longest_key = places
    lengths = torch.diff(bounds).tolist()
    assert bounds is bounds_of_keys
    assert bounds.dtype == torch.int32
    assert longest == longest_key == max(lengths)
    assert options == {"dropout_p": 0.0, "return_debug_mask": False}
    assert window_size_right == 0
    inputs = [x.transpose(0, 1)[None] for x in (query, key, value)]
    window = None if window_size_left < 0 else window_size_left + 1
    assert is_causal == (window is None)
    scaling = WIDTH**-0.5 if scale is None else scale
    return by_definition(inputs, lengths, scaling=scaling, window=window)[0], "log-sum-exp"


@pytest.mark.parametrize("window", [None, 3, 1])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_what_flash_attention_is_told(monkeypatch, window, scaling):
    lengths = LENGTHS["ragged"]
    inputs = random_inputs(sum(lengths))
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", flash_forward)
    monkeypatch.setattr(attention, "flash_can", lambda *_: True)
    ours = layout_of(lengths).attend(*inputs, AttentionCall(0, scaling, window))
    assert_near(ours, by_definition(inputs, lengths, scaling=scaling or WIDTH**-0.5, window=window))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("num_key_heads", [NUM_KEY_HEADS, NUM_HEADS])
def test_gpus_compute_the_same_attention_and_gradient(lengths, window, softcap, dtype, num_key_heads):
    drawn = random_inputs(sum(lengths), num_key_heads=num_key_heads)
    inputs = [x.detach().to(dtype).requires_grad_() for x in drawn]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    there = [x.detach().cuda().requires_grad_() for x in inputs]
    batch = pack([[0] * n for n in lengths], [[False] * n for n in lengths]).to(torch.device("cuda"))
    ours = PackedLayout.of(batch).attend(*there, AttentionCall(0, 0.3, window, softcap))
    wanted = by_definition(exact, lengths, scaling=0.3, window=window, softcap=softcap)
    assert_near(ours, wanted, dtype=dtype)
    ours.sum().backward()
    wanted.sum().backward()
    for got, expected in zip(there, exact, strict=True):
        assert_near(got.grad, expected.grad, dtype=dtype)
