"""Saved folders, read back by transformers alone."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

from dovetail.batches import pack
from dovetail.errors import CheckpointError
from dovetail.model import save
from dovetail.model.forward import last_hidden_states, last_scores, token_logprobs
from dovetail.model.heads import centre_on
from dovetail.model.load import load_causal_lm, load_scalar_model
from dovetail.model.lora import add_lora
from dovetail.model.save import save_model
from dovetail.model.scalar import scalar_model_from
from tests.fakes import END, PADDED, TINY, byte_tokenizer, tiny_model
from tests.tolerance import assert_near

EOS, PAD = 256, 257
TEXTS = ["Hello", "How are you?", "!", "A longer one, to be sure."]


def batch():
    rows = [[*text.encode(), EOS] for text in TEXTS]
    return pack(rows, [[True] * len(row) for row in rows])


def pads_with_eos():
    """As so many tokenizers do."""
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = END
    return tokenizer


def scores_by_transformers(folder: Path, attention: str | None = None):
    """A padded batch through the Auto classes, as any user would."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, attn_implementation=attention)
    # The tokenizer does not know that its bytes in these models are ids as they stand, so ids it is.
    rows = [{"input_ids": [*text.encode(), EOS]} for text in TEXTS]
    padded = tokenizer.pad(rows, return_tensors="pt")
    with torch.no_grad():
        return model(**padded).logits[:, 0]


def attention_of(name: str) -> str | None:
    return "eager" if name == "gemma2" else None  # SDPA would leave out its soft cap


@pytest.mark.parametrize("tokenizer", [byte_tokenizer, pads_with_eos])
@pytest.mark.parametrize("name", [*TINY, "bloom"])
@pytest.mark.filterwarnings("ignore:Bloom:RuntimeWarning")
def test_transformers_reads_the_scores_we_read_centring_included(tmp_path, name, tokenizer):
    assert "bloom" in PADDED
    model = scalar_model_from(tiny_model(name), seed=1, pad_token_id=tokenizer().pad_token_id)
    with torch.no_grad():
        centre_on(model, last_hidden_states(model, batch()), last_scores(model, batch()))
        ours = last_scores(model, batch())
    save_model(model, tokenizer(), tmp_path / "reward")
    assert_near(scores_by_transformers(tmp_path / "reward", attention_of(name)), ours)
    again = load_scalar_model(
        tmp_path / "reward", dtype=torch.float32, device="cpu", seed=0, pad_token_id=None
    )
    assert_near(last_scores(again, batch()), ours)


def test_a_model_without_a_spare_row_grows_by_one_on_disk_only(tmp_path):
    model = scalar_model_from(tiny_model(), seed=1, pad_token_id=EOS)
    model.resize_token_embeddings(257, mean_resizing=False)
    tokenizer = byte_tokenizer()
    only_end = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token=END, pad_token=END)
    ours = last_scores(model, batch())
    grown = save.padding_for_scores(only_end, 257, (EOS, PAD))
    save_model(model, only_end, tmp_path / "reward", stop_token_ids=(EOS, PAD))
    assert model.get_input_embeddings().num_embeddings == 257
    assert grown.num_rows == json.loads((tmp_path / "reward" / "config.json").read_text())["vocab_size"] > 257
    assert_near(scores_by_transformers(tmp_path / "reward"), ours)


@pytest.mark.parametrize("name", TINY)
def test_a_language_model_loads_with_the_auto_classes(tmp_path, name):
    model = tiny_model(name)
    wanted = token_logprobs(model, batch()).logprobs_T  # switches it to packed attention
    save_model(model, byte_tokenizer(), tmp_path / "actor")
    assert not any("dovetail" in file.read_text() for file in (tmp_path / "actor").glob("*.json"))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "actor", attn_implementation=attention_of(name))
    assert theirs.config._attn_implementation != "dovetail"
    with torch.no_grad():
        for ids, part in zip(
            [[*text.encode(), EOS] for text in TEXTS], wanted.split(batch().lengths), strict=True
        ):
            rows = theirs(torch.tensor([ids])).logits[0].log_softmax(-1)
            assert_near(part[1:], rows[:-1].gather(-1, torch.tensor(ids)[1:, None]).squeeze(-1))
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "actor")("hi")["input_ids"]
        == byte_tokenizer()("hi")["input_ids"]
    )


def test_generation_stops_where_answers_end(tmp_path):
    save_model(tiny_model(), byte_tokenizer(), tmp_path / "one")
    assert GenerationConfig.from_pretrained(tmp_path / "one").eos_token_id == EOS
    save_model(tiny_model(), byte_tokenizer(), tmp_path / "two", stop_token_ids=(EOS, 10))
    saved = GenerationConfig.from_pretrained(tmp_path / "two")
    assert (saved.eos_token_id, saved.pad_token_id) == ([EOS, 10], PAD)


def test_weights_are_cast_on_disk_and_nowhere_else(tmp_path):
    model = tiny_model("qwen2")
    save_model(model, byte_tokenizer(), tmp_path / "actor", dtype=torch.bfloat16)
    assert model.dtype == torch.float32
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "actor", dtype="auto")
    assert theirs.dtype == torch.bfloat16
    assert theirs.get_output_embeddings().weight is theirs.get_input_embeddings().weight
    for one, other in zip(model.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(one.to(torch.bfloat16), other)


def test_a_lora_model_is_saved_merged_with_its_adapter_beside(tmp_path):
    tiny_model().save_pretrained(tmp_path / "base")
    model = add_lora(
        load_causal_lm(tmp_path / "base", dtype=torch.float32, device="cpu"), rank=2, alpha=4, seed=0
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.constant_(parameter, 0.1)
    wanted = token_logprobs(model, batch()).logprobs_T.detach()
    save_model(model, byte_tokenizer(), tmp_path / "actor")
    merged = load_causal_lm(tmp_path / "actor", dtype=torch.float32, device="cpu")
    assert_near(token_logprobs(merged, batch()).logprobs_T, wanted)
    adapted = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "actor_adapter")
    assert_near(token_logprobs(adapted, batch()).logprobs_T, wanted)


def test_a_lora_reward_model_is_centred_and_saved_with_its_head(tmp_path):
    model = add_lora(scalar_model_from(tiny_model("gpt2"), seed=1, pad_token_id=PAD), rank=2, alpha=4, seed=0)
    with torch.no_grad():
        centring = centre_on(model, last_hidden_states(model, batch()), last_scores(model, batch()))
        ours = last_scores(model, batch())
    assert_near(torch.tensor(centring.mean_after), float(ours.mean()), dtype=torch.float32)
    save_model(model, byte_tokenizer(), tmp_path / "reward")
    assert_near(scores_by_transformers(tmp_path / "reward"), ours)


def test_saving_again_replaces_the_folder_and_leaves_nothing_beside_it(tmp_path):
    for seed in (0, 1):
        save_model(tiny_model(seed=seed), byte_tokenizer(), tmp_path / "actor")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "actor")
    assert torch.equal(theirs.lm_head.weight, tiny_model(seed=1).lm_head.weight)
    assert [child.name for child in tmp_path.iterdir()] == ["actor"]


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), PermissionError(13, "denied")]
)
def test_a_full_disk_is_told_and_harms_nothing(tmp_path, monkeypatch, error):
    save_model(tiny_model(seed=0), byte_tokenizer(), tmp_path / "actor")
    before = (tmp_path / "actor" / "model.safetensors").read_bytes()

    def fails(self, folder, **_):
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise error

    model = tiny_model(seed=1)
    monkeypatch.setattr(type(model), "save_pretrained", fails)
    with pytest.raises(CheckpointError, match=str(tmp_path / "actor")) as caught:
        save_model(model, byte_tokenizer(), tmp_path / "actor")
    assert ("the disk is full" in caught.value.message) == (error.errno == errno.ENOSPC)
    assert (tmp_path / "actor" / "model.safetensors").read_bytes() == before
    assert [child.name for child in tmp_path.iterdir()] == ["actor"]


def test_what_a_killed_process_left_is_swept_away(tmp_path):
    (tmp_path / ".actor.unfinished").mkdir()
    (tmp_path / ".actor.unfinished" / "model.safetensors").touch()
    save_model(tiny_model(), byte_tokenizer(), tmp_path / "actor")
    assert [child.name for child in tmp_path.iterdir()] == ["actor"]


def change_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def flip(weights):
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] += 1e-6


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (lambda folder: change_weights(folder, flip), r"layers\.1\.mlp\.up_proj\.weight has other values"),
        (
            lambda folder: change_weights(folder, lambda w: w.pop("model.norm.weight")),
            r"model\.norm\.weight is not there",
        ),
        (
            lambda folder: change_weights(folder, lambda w: w.update(extra=torch.ones(2))),
            "extra is not a weight of the model",
        ),
        (lambda folder: change_config(folder, rms_norm_eps=0.5), "its output is .* away"),
        (
            lambda folder: change_config(folder, rope_parameters={"rope_type": "default", "rope_theta": 3.0}),
            "its output is .* away",
        ),
    ],
)
def test_a_folder_that_gives_another_model_is_not_kept(tmp_path, monkeypatch, harm, told):
    save_model(tiny_model(seed=0), byte_tokenizer(), tmp_path / "actor")
    before = (tmp_path / "actor" / "model.safetensors").read_bytes()
    real = save._write_files

    def harmed(parts, folder, *more):
        real(parts, folder, *more)
        harm(folder)

    monkeypatch.setattr(save, "_write_files", harmed)
    with pytest.raises(CheckpointError, match=told):
        save_model(tiny_model(seed=1), byte_tokenizer(), tmp_path / "actor")
    assert (tmp_path / "actor" / "model.safetensors").read_bytes() == before
    assert [child.name for child in tmp_path.iterdir()] == ["actor"]


def test_a_tokenizer_that_reads_otherwise_when_loaded_again_is_told(tmp_path, monkeypatch):
    class Forgetful(PreTrainedTokenizerFast):
        def save_pretrained(self, folder, **options):
            plain = byte_tokenizer()
            plain.eos_token = "!"
            return plain.save_pretrained(folder, **options)

    tokenizer = Forgetful(
        tokenizer_object=byte_tokenizer().backend_tokenizer, eos_token=END, pad_token="<|pad|>"
    )
    with pytest.raises(CheckpointError, match="the tokenizer that was written is not the one in memory"):
        save_model(tiny_model(), tokenizer, tmp_path / "actor")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_not_written(tmp_path, number):
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[2, 2] = number
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight is not finite"):
        save_model(model, byte_tokenizer(), tmp_path / "actor")


def test_weights_too_large_for_the_precision_on_disk_are_named(tmp_path):
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[2, 2] = 1e5
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is not finite in float16") as caught:
        save_model(model, byte_tokenizer(), tmp_path / "actor", dtype=torch.float16)
    assert "bf16" in caught.value.hint
    save_model(model, byte_tokenizer(), tmp_path / "actor", dtype=torch.bfloat16)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o002, 0o664)])
def test_every_file_has_the_mode_that_the_umask_asks_for(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        save_model(add_lora(tiny_model(), rank=2, alpha=2, seed=0), byte_tokenizer(), tmp_path / "actor")
    finally:
        os.umask(before)
    files = [file for folder in ("actor", "actor_adapter") for file in (tmp_path / folder).iterdir()]
    assert {file.suffix for file in files} >= {".json", ".safetensors"}
    assert {file.name: oct(file.stat().st_mode & 0o777) for file in files} == {
        file.name: oct(mode) for file in files
    }


@pytest.mark.parametrize("kind", ["language model", "reward model", "adapted", "without memory"])
def test_saving_can_be_tried_without_weights_and_leaves_nothing(tmp_path, kind):
    model = tiny_model()
    if kind == "reward model":
        model = scalar_model_from(model, seed=0, pad_token_id=EOS)
    elif kind == "adapted":
        model = add_lora(model, rank=2, alpha=2, seed=0)
    elif kind == "without memory":
        model = model.to("meta")
    save.expect_savable(model, byte_tokenizer(), tmp_path / "stage" / "model")
    assert list((tmp_path / "stage").iterdir()) == []


def test_what_would_fail_at_the_end_fails_when_saving_is_tried(tmp_path, monkeypatch):
    model = tiny_model()
    model.generation_config.temperature = 0.5  # without do_sample: transformers writes no such config
    with pytest.raises(CheckpointError, match="`temperature` is set to"):
        save.expect_savable(model, byte_tokenizer(), tmp_path / "model")
    tokenizer = byte_tokenizer()
    monkeypatch.setattr(tokenizer, "save_pretrained", lambda folder: (folder / "no" / "such").touch())
    with pytest.raises(CheckpointError, match="No such file"):
        save.expect_savable(tiny_model(), tokenizer, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_nobody_may_write_into_is_named_with_what_helps(tmp_path, monkeypatch):
    def denied(self, *_, **__):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", denied)
    with pytest.raises(CheckpointError, match="Permission denied") as caught:
        save.expect_savable(tiny_model(), byte_tokenizer(), tmp_path / "model")
    assert caught.value.hint.startswith(f"make {tmp_path} writable")
