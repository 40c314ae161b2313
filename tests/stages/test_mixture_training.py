"""Mixture training (PPO-ptx): what PPO makes a trained model forget, and that plain text beside it keeps."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from dovetail.model.load import load_causal_lm
from dovetail.model.save import save_model
from dovetail.stages import pipeline
from dovetail.text.tokenizer import load_tokenizer
from tests.fakes import byte_tokenizer, tiny_model
from tests.stages.runs import tiny_run, write_rows

NOUNS = ("tea", "sea", "dog", "hat", "sun", "cup")
VERBS = ("was here", "is red", "may go", "has gone")
TEXTS = [f"The {noun} {verb}." for noun in NOUNS for verb in VERBS]
LEARNT, UNSEEN = TEXTS[::2], TEXTS[1::2]
LOSS = "ppo/held_out_text_loss"


@pytest.fixture(scope="module")
def model_of_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that has learnt the texts which it is given: it has something to forget."""
    folder = tmp_path_factory.mktemp("trained")
    model, tokenizer = tiny_model(), byte_tokenizer()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    rows = [torch.tensor([*tokenizer(text).input_ids, tokenizer.eos_token_id]) for text in LEARNT]
    for _ in range(80):
        loss = torch.stack([cross_entropy(model(ids[None, :-1]).logits[0], ids[1:]) for ids in rows]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    save_model(model, tokenizer, folder)
    return folder


def losses_of_ppo(folder: Path, model: Path, **ppo: Any) -> list[float]:
    """Held-out text loss at step 0 and at each evaluation of a run that is paid for writing "e"."""
    folder.mkdir()
    judge = folder / "judge.py"
    judge.write_text("def score(answers):\n    return [float(a.text.count('e')) for a in answers]\n")
    texts = [
        {"path": str(write_rows(folder / f"{name}.jsonl", [{"text": t} for t in part])), "text": "text"}
        | {"held_out": name == "unseen"}
        for name, part in (("learnt", LEARNT), ("unseen", UNSEEN))
    ]
    changes = {"reward_function": f"{judge}:score", "max_steps": 24, "eval_every": 12, "save_every": 24} | ppo
    rate = {"learning_rate": 3e-3, "schedule": "constant"}
    changes |= {"batch_size": 16, "kl_coefficient": 0.0, "kl_stop": None, "actor_optimizer": rate}
    config = tiny_run(
        folder,
        stages=("ppo",),
        actor={"path": str(model)},
        reward_model={"path": str(model)},
        data={"pretraining": texts},
        ppo=changes,
    )
    pipeline.run(config)
    rows = [json.loads(line) for line in (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()]
    return [row[LOSS] for row in rows if LOSS in row]


def test_mixture_training_at_its_default_weight_keeps_ppo_from_forgetting_plain_text(
    model_of_text: Path, tmp_path: Path
) -> None:
    without = losses_of_ppo(tmp_path / "without", model_of_text, ptx_coefficient=0.0)
    mixed = losses_of_ppo(tmp_path / "mixed", model_of_text)
    assert mixed[0] == without[0]
    rise_without, rise_mixed = without[-1] - without[0], mixed[-1] - mixed[0]
    assert rise_without > 0.2
    assert rise_mixed < 0.5 * rise_without


def test_the_held_out_text_loss_is_the_mean_cross_entropy_of_text_that_nothing_learns_from(
    model_of_text: Path, tmp_path: Path
) -> None:
    reported = losses_of_ppo(tmp_path / "run", model_of_text, max_steps=1)[0]
    model = load_causal_lm(str(model_of_text), dtype=torch.float64, device="cpu")
    tokenizer = load_tokenizer(model_of_text)
    total, count = 0.0, 0
    for text in UNSEEN:
        ids = torch.tensor([*tokenizer(text).input_ids, tokenizer.eos_token_id])
        with torch.no_grad():
            total += float(cross_entropy(model(ids[None, :-1]).logits[0], ids[1:], reduction="sum"))
        count += len(ids) - 1
    assert reported == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize(
    ("data", "ppo", "says"),
    [
        ({}, {"ptx_batch_size": 3}, "mixture training: on, 3 texts a step, weight 0.1"),
        ({}, {"ptx_coefficient": 0.0}, "mixture training: off, ppo.ptx_coefficient = 0"),
        ({"pretraining": []}, {}, "mixture training: off, data.pretraining lists no text"),
    ],
)
def test_stage_3_says_whether_mixture_training_is_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], data: Any, ppo: Any, says: str
) -> None:
    judge = tmp_path / "judge.py"
    judge.write_text("def score(answers):\n    return [0.0] * len(answers)\n")
    judged = {"max_steps": 1, "reward_function": f"{judge}:score", **ppo}
    pipeline.run(tiny_run(tmp_path, stages=("ppo",), data=data, ppo=judged))
    shown = capsys.readouterr()
    assert says in shown.out + shown.err
