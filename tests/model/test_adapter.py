"""Adapters of other trainers, beside what transformers and peft compute with them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from dovetail.cli.export import export
from dovetail.errors import ModelError
from dovetail.model.adapter import with_adapter
from dovetail.model.load import load_causal_lm
from dovetail.model.lora import merge
from dovetail.model.save import save_model
from dovetail.model.scalar import scalar_model_from
from dovetail.serving.inference.loading import load_chat
from dovetail.text.tokenizer import load_tokenizer
from tests.fakes import END, byte_tokenizer, tiny_model
from tests.tolerance import assert_near

pytestmark = pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")

IDS = torch.tensor([[1, 2, 3, 4, 5]])
NEW_ROWS = 260
TEMPLATE = "{% for m in messages %}{{ '[' + m.role + ']' + m.content + '<|end|>' }}{% endfor %}"
HERE: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    save_model(tiny_model(), byte_tokenizer(), tmp_path / "base")
    return tmp_path / "base"


def trained(base: Path, *, rows: int | None = None, **settings: Any) -> PeftModel:
    """An adapter with an effect, on a base with more rows if asked for."""
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        if rows is not None:
            model.resize_token_embeddings(rows)
        options = {"task_type": "CAUSAL_LM", "r": 2, "target_modules": ["q_proj", "up_proj"], **settings}
        adapted = get_peft_model(model, LoraConfig(**options))
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name or "modules_to_save" in name or "delta" in name:
                parameter.data += 0.2 * torch.randn_like(parameter)
    return adapted.eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def own_tokens(folder: Path, number: int) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([f"<tool{i}>" for i in range(number)])
    tokenizer.save_pretrained(folder)


KINDS: dict[str, Callable[[Path], PeftModel]] = {
    "plain": trained,
    "with an embedding and a head of its own": lambda base: trained(
        base, rows=NEW_ROWS, modules_to_save=["embed_tokens", "lm_head"]
    ),
    "whose base was resized": lambda base: trained(base, rows=NEW_ROWS),
    "with fewer rows": lambda base: trained(base, rows=258, modules_to_save=["lm_head"]),
    "that trains some rows": lambda base: trained(base, trainable_token_indices=[3, 4]),
    "with dora": lambda base: trained(base, use_dora=True),
    "of every linear layer": lambda base: trained(base, target_modules="all-linear", use_rslora=True),
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_computes_what_peft_computes_alone_and_merged_and_its_base_stays(
    tmp_path: Path, base: Path, kind: str
) -> None:
    theirs = KINDS[kind](base)
    theirs.save_pretrained(tmp_path / "adapter")
    model = load_causal_lm(base, **HERE)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    adapted = with_adapter(model, tmp_path / "adapter")
    assert_near(logits(adapted), logits(theirs))
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert model.config.vocab_size == 258
    assert_near(logits(merge(adapted)), logits(theirs))


def test_adapters_of_one_base_share_its_weights_and_not_their_own_rows(tmp_path: Path, base: Path) -> None:
    resized = trained(base, rows=NEW_ROWS, modules_to_save=["embed_tokens", "lm_head"])
    resized.save_pretrained(tmp_path / "resized")
    own_tokens(tmp_path / "resized", 2)
    trained(base).save_pretrained(tmp_path / "plain")
    bases: dict[str, Any] = {}
    one, other = (load_chat(str(tmp_path / name), device="cpu", bases=bases) for name in ("resized", "plain"))
    assert list(bases) == [str(base)]
    shared = [chat.model.get_base_model().model.layers[0].mlp.down_proj.weight for chat in (one, other)]
    assert shared[0] is shared[1]
    assert_near(logits(one.model), logits(resized))
    assert one.chat.tokenizer.convert_tokens_to_ids("<tool1>") == 259


def test_an_adapter_without_a_tokenizer_has_its_base_s(tmp_path: Path, base: Path) -> None:
    trained(base).save_pretrained(tmp_path / "adapter")
    (base / "generation_config.json").write_text('{"eos_token_id": [256, 10]}')
    loaded = load_chat(str(tmp_path / "adapter"), device="cpu").chat
    assert loaded.fingerprint == load_chat(str(base), device="cpu").chat.fingerprint
    assert loaded.stop_token_ids == (256, 10)
    (tmp_path / "adapter" / "chat_template.jinja").write_text(TEMPLATE)
    assert load_tokenizer(tmp_path / "adapter").chat_template == TEMPLATE


def test_an_adapter_is_exported_with_its_own_template_tokens_and_end(tmp_path: Path, base: Path) -> None:
    theirs = trained(base, rows=NEW_ROWS, modules_to_save=["embed_tokens", "lm_head"])
    theirs.save_pretrained(tmp_path / "adapter")
    own_tokens(tmp_path / "adapter", 2)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "adapter")
    tokenizer.chat_template, tokenizer.eos_token = TEMPLATE.replace(END, "<tool0>"), "<tool0>"
    tokenizer.save_pretrained(tmp_path / "adapter")
    export(str(tmp_path / "adapter"), tmp_path / "out", dtype="fp32", which=None, from_checkpoint=None)
    written = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (written.chat_template, written.eos_token_id) == (tokenizer.chat_template, 258)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.generation_config.eos_token_id == [258, 256]
    assert_near(logits(model), logits(theirs))


def test_the_adapter_of_a_reward_model_is_exported_as_one_and_never_chats(tmp_path: Path, base: Path) -> None:
    reward = scalar_model_from(load_causal_lm(base, **HERE), seed=3, pad_token_id=257)
    settings = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"], modules_to_save=["score"])
    adapted = get_peft_model(reward, settings)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.fill_(0.1)
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(tmp_path / "adapter")
    export(str(tmp_path / "adapter"), tmp_path / "out", dtype="fp32", which=None, from_checkpoint=None)
    from transformers import AutoModelForSequenceClassification

    assert_near(logits(AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")), logits(adapted))
    with pytest.raises(ModelError, match="an adapter of a reward model"):
        load_chat(str(tmp_path / "adapter"), device="cpu")


def edit(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


KEY = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda tensors: tensors.pop(KEY), "a layer that it says nothing about"),
        (
            lambda tensors: tensors.update({KEY.replace("1", "7"): tensors.pop(KEY)}),
            "no place for its .*layers.7",
        ),
        (lambda tensors: tensors.update({KEY: torch.ones(3, 3)}), "cannot be loaded: .*size mismatch"),
    ],
    ids=["absent", "surplus", "shape"],
)
def test_an_adapter_that_does_not_fit_its_base_is_told_and_not_filled_in(
    tmp_path: Path, base: Path, change: Callable[[dict[str, Tensor]], Any], told: str
) -> None:
    trained(base).save_pretrained(tmp_path / "adapter")
    edit(tmp_path / "adapter", change)
    with pytest.raises(ModelError, match=told):
        with_adapter(load_causal_lm(base, **HERE), tmp_path / "adapter")


def test_an_adapter_that_puts_tokens_before_the_text_is_refused(tmp_path: Path, base: Path) -> None:
    settings = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ModelError, match=r"an adapter of the kind .*PROMPT_TUNING"):
        with_adapter(load_causal_lm(base, **HERE), tmp_path / "adapter")


def test_an_adapter_saved_as_a_pickle_is_read(tmp_path: Path, base: Path) -> None:
    theirs = trained(base)
    theirs.save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()
    assert_near(logits(with_adapter(load_causal_lm(base, **HERE), tmp_path / "adapter")), logits(theirs))


def test_a_whole_model_beside_an_adapter_is_not_chosen_from(tmp_path: Path, base: Path) -> None:
    trained(base).save_pretrained(base)
    readers: tuple[Callable[[], Any], ...] = (
        lambda: load_causal_lm(base, **HERE),
        lambda: load_chat(str(base), device="cpu"),
        lambda: export(str(base), tmp_path / "out", dtype="fp32", which=None, from_checkpoint=None),
    )
    for read in readers:
        with pytest.raises(ModelError, match=r"both a whole model \(model\.safetensors\) and a LoRA adapter"):
            read()


def test_an_adapter_with_its_base_s_config_is_still_an_adapter(tmp_path: Path, base: Path) -> None:
    trained(base).save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "config.json").write_text((base / "config.json").read_text())
    with pytest.raises(ModelError, match="it has an adapter alone"):
        load_causal_lm(tmp_path / "adapter", **HERE)
    load_chat(str(tmp_path / "adapter"), device="cpu")


@pytest.mark.parametrize("settings", ["{}", "[]", "{", '{"base_model_name_or_path": null}'])
def test_an_adapter_that_names_no_base_is_told(tmp_path: Path, settings: str) -> None:
    (tmp_path / "adapter_config.json").write_text(settings)
    with pytest.raises(ModelError, match=r"adapter_config\.json"):
        load_chat(str(tmp_path), device="cpu")


def test_a_merge_that_changes_the_output_is_refused(base: Path) -> None:
    adapted = trained(base)
    layer = adapted.get_base_model().model.layers[1].mlp.up_proj
    layer.merge = lambda **_: None  # as of a layer whose adapters peft does not know how to merge
    with pytest.raises(ModelError, match=r"merging the adapters into LlamaForCausalLM changes its output by"):
        merge(adapted)


def test_the_revision_of_the_base_is_the_one_that_the_adapter_names(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(base).save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"revision": "v2"}))
    asked = []

    def loads(path: str, **options: Any) -> Any:
        asked.append((path, options["revision"]))
        return load_causal_lm(path, **options)

    monkeypatch.setattr("dovetail.serving.inference.loading.load_causal_lm", loads)
    load_chat(str(tmp_path / "adapter"), device="cpu")
    assert asked == [(str(base), "v2")]
