"""Dropout stays off in training mode, wherever a class keeps its probability."""

import pytest
import torch
from torch import nn

from dovetail.batches import pack
from dovetail.model.dropout import disable_dropout
from dovetail.model.forward import token_logprobs
from dovetail.model.lora import add_lora
from tests.fakes import TINY, tiny_model

IDS = [1, 2, 3, 4, 5]


def with_dropout(name):
    model = tiny_model(name)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
        for key, value in vars(module).items():
            if "dropout" in key and isinstance(value, float):
                setattr(module, key, 0.5)
    return model


@pytest.mark.parametrize("name", TINY)
def test_two_forwards_in_training_mode_are_equal(name):
    model = with_dropout(name)
    disable_dropout(model)
    model.train()
    ids = torch.tensor([IDS])
    assert torch.equal(model(ids).logits, model(ids).logits)


@pytest.mark.parametrize("name", ["opt", "gpt2"])
def test_the_model_really_had_dropout_before(name):
    model = with_dropout(name).train()
    ids = torch.tensor([IDS])
    assert not torch.equal(model(ids).logits, model(ids).logits)


def test_dropout_of_adapters_goes_too():
    model = add_lora(tiny_model(), rank=2, alpha=2, dropout=0.5, seed=0).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.ones_(parameter)
    batch = pack([IDS], [[True] * 5])
    assert not torch.equal(token_logprobs(model, batch).logprobs_T, token_logprobs(model, batch).logprobs_T)
    disable_dropout(model)
    assert torch.equal(token_logprobs(model, batch).logprobs_T, token_logprobs(model, batch).logprobs_T)


def test_the_config_says_so_and_flags_stay_flags():
    model = tiny_model("gpt2")
    model.config.use_dropout = True
    disable_dropout(model)
    assert (model.config.attn_pdrop, model.config.resid_pdrop, model.config.embd_pdrop) == (0.0, 0.0, 0.0)
    assert model.config.use_dropout is True
