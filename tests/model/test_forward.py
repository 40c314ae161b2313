"""Packed forwards against the Hugging Face classes, one sequence at a time."""

import warnings

import pytest
import torch

from dovetail.batches import pack, pack_ranked
from dovetail.errors import ModelError
from dovetail.model import forward
from dovetail.model.forward import hidden_states, last_scores, masked_index, token_logprobs, token_values
from dovetail.model.scalar import scalar_model_from
from tests.fakes import PADDED, TINY, tiny_model
from tests.tolerance import assert_near

LENGTHS = (7, 1, 12, 3)
PAD_ID = 257

# The precision these classes compute in when the model is float64: some norms and softmaxes are float32 inside.
INSIDE = {"gemma2": torch.float32, "gemma3": torch.float32, "bloom": torch.float32}


def sequences():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (length,), generator=generator).tolist() for length in LENGTHS]


def batch():
    """The last third of each sequence counts."""
    return pack(sequences(), [[3 * i >= 2 * n for i in range(n)] for n in LENGTHS])


@pytest.fixture(autouse=True)
def _padding_may_be_told_again():
    forward._warn_of_padding.cache_clear()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Bloom.*padded", RuntimeWarning)
        yield


def one_at_a_time(model, temperature):
    """log-probabilities and entropies [T] as transformers gives them."""
    logprobs, entropies = [], []
    for ids in sequences():
        rows = (model(torch.tensor([ids])).logits[0] / temperature).log_softmax(-1)
        logprobs += [rows.new_zeros(()), *(rows[i - 1, ids[i]] for i in range(1, len(ids)))]
        entropies += [
            rows.new_zeros(()),
            *(-(rows[i - 1].exp() * rows[i - 1]).sum() for i in range(1, len(ids))),
        ]
    mask = batch().mask_T
    return torch.stack(logprobs) * mask, torch.stack(entropies) * mask


@pytest.mark.parametrize("name", [*TINY, *PADDED])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_packed_logprobs_and_gradients_equal_those_of_single_sequences(name, temperature):
    ours, theirs = tiny_model(name, dtype=torch.float64), tiny_model(name, dtype=torch.float64)
    inside = INSIDE.get(name, torch.float64)
    got = token_logprobs(ours, batch(), temperature=temperature, with_entropy=True)
    logprobs, entropies = one_at_a_time(theirs, temperature)
    assert_near(got.logprobs_T, logprobs, dtype=inside)
    assert_near(got.entropy_T, entropies, dtype=inside)
    slope = torch.linspace(-1, 1, sum(LENGTHS), dtype=torch.float64)
    (got.logprobs_T * slope).sum().backward()
    (logprobs * slope).sum().backward()
    for (parameter_name, one), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), parameter_name
        if one.grad is not None:
            assert_near(one.grad, other.grad, dtype=inside)


@pytest.mark.parametrize("name", TINY)
def test_a_sequence_does_not_notice_its_batch_mates(name):
    model = tiny_model(name, dtype=torch.float64)
    together = hidden_states(model, batch())
    for index, start in enumerate((0, 7, 8, 20)):
        alone = hidden_states(model, batch().sequences([index]))
        # Half of the gemmas' work is in float32, where products round by the number of rows.
        assert_near(together[start : start + LENGTHS[index]], alone, dtype=INSIDE.get(name, torch.float64))


@pytest.mark.parametrize("name", [*TINY, *PADDED])
def test_last_scores_are_those_of_the_sequence_classification_class(name):
    model = scalar_model_from(tiny_model(name), seed=1, pad_token_id=PAD_ID)
    same = scalar_model_from(tiny_model(name), seed=1, pad_token_id=PAD_ID)
    wanted = torch.cat([same(torch.tensor([ids])).logits[0] for ids in sequences()])
    assert_near(last_scores(model, batch()), wanted)


@pytest.mark.parametrize("name", ["llama", "opt-post-norm", "bloom"])
def test_the_value_of_a_token_is_the_score_of_the_state_before_it(name):
    model = scalar_model_from(tiny_model(name, dtype=torch.float64), seed=1, pad_token_id=PAD_ID)
    model.requires_grad_(False)
    values = token_values(model, batch()).tolist()
    expected = []
    for ids in sequences():
        for end in range(len(ids)):
            expected.append(float(last_scores(model, pack([ids[:end]], [[False] * end]))) if end else 0.0)
    assert_near(torch.tensor(values, dtype=torch.float64), expected, dtype=INSIDE.get(name, torch.float64))


def test_scores_of_half_precision_models_are_float32():
    model = scalar_model_from(tiny_model("llama", dtype=torch.bfloat16), seed=1, pad_token_id=PAD_ID)
    assert last_scores(model, batch()).dtype == token_values(model, batch()).dtype == torch.float32
    actor = tiny_model("llama", dtype=torch.bfloat16)
    assert token_logprobs(actor, batch()).logprobs_T.dtype == torch.float32


def test_logprobs_are_computed_at_masked_tokens_only(monkeypatch):
    seen = []
    real = forward.linear_logprobs
    monkeypatch.setattr(
        forward, "linear_logprobs", lambda hidden, *a, **k: seen.append(len(hidden)) or real(hidden, *a, **k)
    )
    counted = batch()
    got = token_logprobs(tiny_model(), counted)
    assert seen == [int(counted.num_targets)]
    assert bool((got.logprobs_T[~counted.mask_T] == 0).all())
    assert got.entropy_T is None


def test_a_batch_in_which_nothing_counts_gives_zeros():
    empty = pack(sequences(), [[False] * n for n in LENGTHS])
    got = token_logprobs(tiny_model(), empty)
    assert got.logprobs_T.tolist() == [0.0] * sum(LENGTHS)


def test_masked_positions_of_rankings_are_found_although_their_targets_are_prompts():
    ranked = pack_ranked([[[1, 2, 3], [1, 2]]], [[(0, 1, 0.0)]])
    assert ranked.num_targets == 1.0
    assert masked_index(ranked).tolist() == [2, 4]


@pytest.mark.parametrize("name", TINY)
def test_activation_checkpointing_changes_no_gradient(name):
    plain, saving = tiny_model(name, dtype=torch.float64), tiny_model(name, dtype=torch.float64)
    forward_and_back(plain.eval())
    saving.gradient_checkpointing_enable({"use_reentrant": False})
    for module in saving.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    forward_and_back(saving.train())
    for one, other in zip(plain.parameters(), saving.parameters(), strict=True):
        if one.grad is not None:
            assert_near(other.grad, one.grad)


def forward_and_back(model):
    token_logprobs(model, batch()).logprobs_T.sum().backward()


def test_padding_is_told_once_with_class_and_reason():
    model = tiny_model("bloom")
    with pytest.warns(RuntimeWarning, match="BloomForCausalLM keeps its own attention") as caught:
        twice(lambda: hidden_states(model, batch()))
    assert len(caught) == 1


def twice(call):
    call()
    call()


def test_a_language_model_has_no_score():
    with pytest.raises(ModelError, match="no head with one score"):
        last_scores(tiny_model(), batch())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", TINY)
def test_gpus_give_the_log_probabilities_of_the_cpu(name):
    wanted = token_logprobs(tiny_model(name), batch()).logprobs_T
    there = batch().to(torch.device("cuda"))
    assert_near(token_logprobs(tiny_model(name).cuda(), there).logprobs_T, wanted)
    half = token_logprobs(tiny_model(name, dtype=torch.bfloat16).cuda(), there).logprobs_T
    half_wanted = token_logprobs(tiny_model(name, dtype=torch.bfloat16), batch()).logprobs_T
    # Two roundings of the same half-precision computation, through several layers.
    assert (half.cpu() - half_wanted).detach().abs().mean().item() < 0.1
