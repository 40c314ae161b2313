from __future__ import annotations

import torch

from dovetail.demo.learner import new_model, small_llama
from dovetail.demo.tokenizer import train_tokenizer

TOKENIZER = train_tokenizer(["Sure! It is red."], 300)


def test_the_model_has_about_a_million_weights_and_knows_its_special_tokens() -> None:
    config = small_llama(TOKENIZER)
    model = new_model(config, seed=0)
    assert 0.8e6 < sum(parameter.numel() for parameter in model.parameters()) < 1.2e6
    assert (config.eos_token_id, config.pad_token_id, config.bos_token_id) == (3, 0, None)


def test_weights_depend_on_the_seed_alone_and_leave_the_global_generator_as_it_was() -> None:
    config = small_llama(TOKENIZER, width=32, layers=1)
    before = torch.get_rng_state()
    first, again, other = (new_model(config, seed=seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])
