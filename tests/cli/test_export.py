from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import dovetail.model.load
import dovetail.text.tokenizer
import dovetail.training.weights
from dovetail.cli.main import main
from dovetail.config.load import dump, load
from dovetail.model.load import load_scalar_model, save_model
from dovetail.model.lora import add_lora
from dovetail.runs.checkpoint import Checkpoints
from dovetail.runs.run_folder import RunFolder
from dovetail.training.weights import trained_weights
from tests.fakes import byte_tokenizer, tiny_model

TEMPLATE = "{% for message in messages %}<{{ message.role }}> {{ message.content }}\\n{% endfor %}"
IDS = torch.arange(1, 13)[None]


def export(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(["export", *arguments])
    return int(stopped.value.code or 0)


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder)(IDS).logits


def with_adapter(seed: int = 1) -> torch.nn.Module:
    """A tiny model with an adapter that does something."""
    model = add_lora(tiny_model("llama"), rank=2, alpha=2.0, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(generator=generator)
    return model


@pytest.fixture
def base(tmp_path: Path) -> Path:
    save_model(tiny_model("llama"), byte_tokenizer(), tmp_path / "base")
    return tmp_path / "base"


def test_a_run_s_model_is_written_with_its_tokenizer(base: Path, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    save_model(tiny_model("llama", seed=3), byte_tokenizer(), run.model("sft"))
    assert export(str(run.path), str(tmp_path / "out"), "--dtype", "fp32") == 0
    torch.testing.assert_close(logits(tmp_path / "out"), tiny_model("llama", seed=3)(IDS).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").decode([72, 105]) == byte_tokenizer().decode(
        [72, 105]
    )


def test_a_reward_model_stays_one(base: Path, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    model = load_scalar_model(base, dtype=torch.float32, device="cpu", seed=0, pad_token_id=257)
    save_model(model, byte_tokenizer(), run.model("reward"))
    assert export(str(run.path), str(tmp_path / "out"), "--which", "reward", "--dtype", "fp32") == 0
    written = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(written(IDS).logits, model(IDS).logits)


def test_an_adapter_is_merged_into_its_base(base: Path, tmp_path: Path) -> None:
    model = with_adapter()
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(tmp_path / "adapter")
    assert export(str(tmp_path / "adapter"), str(tmp_path / "out"), "--dtype", "fp32") == 0
    torch.testing.assert_close(logits(tmp_path / "out"), model(IDS).logits)


@pytest.mark.parametrize("which", ["sft", "ppo"])
@pytest.mark.parametrize("checkpoint", ["newest", "best"])
def test_a_checkpoint_of_a_half_finished_stage_can_be_had(
    base: Path, tmp_path: Path, which: str, checkpoint: str
) -> None:
    run = RunFolder(tmp_path / "run")
    changes = [f"actor.path={base}", "actor.lora={rank: 2, alpha: 2}", f"output_dir={run.path}"]
    run.path.mkdir()
    run.config.write_text(dump(load("opt-125m", changes)))
    model = with_adapter()
    weights = trained_weights(model)
    other = {name: torch.zeros_like(weight) for name, weight in weights.items()}

    def state(weights: dict[str, torch.Tensor]) -> dict[str, Any]:
        return {"model": weights} if which == "sft" else {"engine": {"actor": weights}}

    checkpoints = Checkpoints(run.checkpoints(which))
    checkpoints.save(10, state(weights if checkpoint == "best" else other), metric=-0.5)
    checkpoints.save(20, state(weights if checkpoint == "newest" else other), metric=-0.6)
    arguments = (
        str(run.path),
        str(tmp_path / "out"),
        "--which",
        which,
        "--from-checkpoint",
        checkpoint,
        "--dtype",
        "fp32",
    )
    assert export(*arguments) == 0
    torch.testing.assert_close(logits(tmp_path / "out"), model(IDS).logits)


@pytest.mark.parametrize(
    ("which", "is_after_sft", "revision"),
    [
        ("sft", False, "v2"),
        ("ppo", False, "v2"),
        ("ppo", True, None),
        ("reward", False, "v2"),
        ("reward", True, None),
    ],
)
def test_a_checkpoint_goes_onto_the_model_that_the_settings_name_with_its_template(
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    which: str,
    is_after_sft: bool,
    revision: str | None,
) -> None:
    run = RunFolder(tmp_path / "run")
    actor = f"{{path: {base}, revision: v2, trust_remote_code: true, chat_template: '{TEMPLATE}'}}"
    start = "sft" if is_after_sft else "model"
    run.path.mkdir()
    changes = [f"actor={actor}", "reward_model=null", f"reward.start_from={start}", f"output_dir={run.path}"]
    run.config.write_text(dump(load("opt-125m", changes)))
    if is_after_sft:
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = TEMPLATE
        save_model(tiny_model("llama"), tokenizer, run.model("sft"))
        (run.path / "sft" / "done").write_text("")
    asked = [
        asked_of(
            monkeypatch, dovetail.model.load, f"load_{'scalar_model' if which == 'reward' else 'causal_lm'}"
        ),
        asked_of(monkeypatch, dovetail.text.tokenizer, "load_tokenizer"),
    ]
    monkeypatch.setattr(dovetail.training.weights, "load_trained", lambda model, weights: None)
    Checkpoints(run.checkpoints(which)).save(10, {"model": {}, "engine": {"actor": {}}})
    out = tmp_path / "out"
    assert export(str(run.path), str(out), "--which", which, "--from-checkpoint", "newest") == 0
    place = str(run.model("sft") if is_after_sft else base)
    assert asked == [[(place, revision, True)]] * 2
    assert AutoTokenizer.from_pretrained(out).chat_template == TEMPLATE


def asked_of(
    monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str
) -> list[tuple[str, str | None, bool]]:
    """Path, revision and trust in its code, of all that a loader is asked for: a folder has but one revision."""
    asked = []
    real = getattr(module, name)

    def loader(path: str, **options: Any) -> Any:
        asked.append((path, options["revision"], options["trust_remote_code"]))
        return real(path, **options)

    monkeypatch.setattr(module, name, loader)
    return asked


def test_without_a_word_a_checkpoint_is_that_of_ppo_else_of_sft(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    run.config.write_text(dump(load("opt-125m", [f"actor.path={base}", f"output_dir={run.path}"])))
    weights = trained_weights(tiny_model("llama"))
    Checkpoints(run.checkpoints("sft")).save(10, {"model": weights})
    assert export(str(run.path), str(tmp_path / "one"), "--from-checkpoint", "newest") == 0
    assert "sft after step 10" in capsys.readouterr().err
    Checkpoints(run.checkpoints("dpo")).save(3, {"model": weights})
    assert export(str(run.path), str(tmp_path / "three"), "--from-checkpoint", "newest") == 0
    assert "dpo after step 3" in capsys.readouterr().err
    Checkpoints(run.checkpoints("ppo")).save(2, {"engine": {"actor": weights}})
    assert export(str(run.path), str(tmp_path / "two"), "--from-checkpoint", "newest") == 0
    assert "ppo after step 2" in capsys.readouterr().err


def test_what_is_not_finished_or_not_there_is_said(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    run.config.write_text("")
    out = str(tmp_path / "out")
    assert export(str(run.path), out, "--which", "ppo") == 2
    assert "has no finished ppo model" in capsys.readouterr().err
    assert export(str(run.path), out, "--which", "ppo", "--from-checkpoint", "newest") == 2
    assert "has no checkpoint" in capsys.readouterr().err
    assert export(str(run.path), out, "--which", "sft", "--from-checkpoint", "best") == 2
    assert "with an evaluation right before it" in capsys.readouterr().err
    assert export(str(run.path), out, "--which", "ema", "--from-checkpoint", "newest") == 2
    assert "cannot be taken from a checkpoint" in capsys.readouterr().err
    assert export(str(base), str(base)) == 2
    assert "exists already" in capsys.readouterr().err
    assert not Path(out).exists()
