"""What Hugging Face's libraries print, and whether they may again afterwards."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from huggingface_hub.utils import tqdm as hub_bar
from transformers import modeling_gguf_pytorch_utils as gguf_reader
from transformers.utils import logging

from dovetail.text.quiet import quiet

ROOT = Path(__file__).parents[2]


@pytest.fixture
def bars(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in a user's process: the other tests run without bars."""
    monkeypatch.setattr(sys.modules["huggingface_hub.utils.tqdm"], "HF_HUB_DISABLE_PROGRESS_BARS", None)
    logging.enable_progress_bar()
    yield
    logging.disable_progress_bar()


def show_everything() -> None:
    """A bar of each kind, and a line."""
    for bar in (logging.tqdm, gguf_reader.tqdm, hub_bar):
        list(bar([1, 2], desc="a bar"))
    logging.get_logger("transformers").warning("a line")


def states() -> tuple[object, ...]:
    bars = (logging.is_progress_bar_enabled(), are_progress_bars_disabled(), gguf_reader.tqdm)
    return (*bars, logging.get_verbosity())


@pytest.mark.usefixtures("bars")
def test_nothing_is_printed_inside_and_everything_outside(capfd: pytest.CaptureFixture[str]) -> None:
    with quiet():
        show_everything()
    assert capfd.readouterr() == ("", "")
    show_everything()
    assert capfd.readouterr().err.count("a bar: 100%") == 3


@pytest.mark.usefixtures("bars")
@pytest.mark.parametrize("hub_is_silent", [False, True])
def test_everything_is_put_back_after_a_failure_too(hub_is_silent: bool) -> None:
    (disable_progress_bars if hub_is_silent else enable_progress_bars)()
    before = states()
    changed = False

    def fail_inside() -> None:
        nonlocal changed
        with quiet():
            changed = states() != before
            raise OSError("broken")

    with pytest.raises(OSError, match="broken"):
        fail_inside()
    assert changed
    assert states() == before


def test_what_was_silent_before_stays_silent() -> None:
    with quiet():
        show_everything()
    assert not logging.is_progress_bar_enabled()


READ_AND_WRITE = """
import sys
from pathlib import Path
import torch
from dovetail.errors import DovetailError
from dovetail.model.load import load_causal_lm, load_scalar_model
from dovetail.model.lora import add_lora
from dovetail.model.save import save_model
from dovetail.text.tokenizer import load_tokenizer
from tests.fakes import byte_tokenizer, tiny_model

folder, here = Path(sys.argv[1]), {"dtype": torch.float32, "device": "cpu"}
save_model(tiny_model(), byte_tokenizer(), folder / "actor")
save_model(add_lora(tiny_model(), rank=2, alpha=2, seed=0), load_tokenizer(folder / "actor"), folder / "lora")
reward = load_scalar_model(folder / "actor", **here, seed=0, pad_token_id=257)
save_model(reward, load_tokenizer(folder / "actor"), folder / "reward", dtype=torch.bfloat16)
load_scalar_model(folder / "reward", **here, seed=0, pad_token_id=None)
(folder / "reward" / "model.safetensors").write_bytes(b"cut off")
(folder / "reward" / "tokenizer.json").write_text("{")
for load in (lambda: load_causal_lm(folder / "reward", **here), lambda: load_tokenizer(folder / "reward")):
    try:
        load()
    except DovetailError:
        continue
    raise AssertionError("loaded")
"""


def test_models_and_tokenizers_are_read_and_written_without_a_sound(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_DISABLE_PROGRESS_BARS"}
    process = subprocess.run(
        [sys.executable, "-c", READ_AND_WRITE, str(tmp_path)],
        cwd=ROOT,
        env={**environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    own = "LoRA: adapters on 14 layers, which hold 99% of the weights beside the embeddings\n"
    assert (process.returncode, process.stdout, process.stderr) == (0, "", own)
