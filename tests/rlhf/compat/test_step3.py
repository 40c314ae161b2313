"""A script in the shape of the predecessor's step 3, in one process and in two."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from dovetail.errors import ConfigError
from dovetail.model.save import save_model
from dovetail.rlhf.compat.deepspeed_chat import (
    DataCollatorRLHF,
    add_config_arguments,
    create_prompt_dataset,
    get_unsupervised_data,
)
from tests.fakes import byte_tokenizer, tiny_model
from tests.parallel.group import run_group
from tests.rlhf.compat import step3, worker
from tests.rlhf.compat.tiny import arguments
from tests.rlhf.tiny import tiny_reward_model
from tests.tolerance import assert_near


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models, prompts and texts."""
    folder = tmp_path_factory.mktemp("step3")
    save_model(tiny_model("opt"), byte_tokenizer(), folder / "actor")
    save_model(tiny_reward_model("opt"), byte_tokenizer(), folder / "reward")
    rows = [{"prompt": f"Question {i}?", "chosen": f"a{i}", "rejected": f"b{i}"} for i in range(20)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = [{"text": f"Some plain text, number {i}."} for i in range(30)]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    return folder


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A process that no launcher started; the group that the script makes is left at the end."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def flags(made: Path, out: Path) -> list[str]:
    given = {
        "data_path": made / "prompts.jsonl",
        "data_split": "0,0,1",
        "actor_model_name_or_path": made / "actor",
        "critic_model_name_or_path": made / "reward",
        "dtype": "bf16",
        "per_device_generation_batch_size": 4,
        "per_device_training_batch_size": 2,
        "max_prompt_seq_len": 64,
        "max_answer_seq_len": 6,
        "num_warmup_steps": 0,
        "actor_learning_rate": 1e-2,
        "critic_learning_rate": 1e-2,
        "actor_lora_learning_rate": 1e-2,
        "critic_lora_learning_rate": 1e-2,
        "seed": 3,
        "output_dir": out,
    }
    return [part for name, value in given.items() for part in (f"--{name}", str(value))]


TEXT = ["--unsupervised_dataset_config_name", "any", "--gradient_accumulation_steps", "2"]
LORA = ["--actor_lora_dim", "4", "--critic_lora_dim", "4"]
EMA = ["--enable_ema", "--actor_gradient_checkpointing", "--enable_test_mode", "--test_stop_step", "2"]


def expect_trained(out: Path, made: Path, *, averaged: bool) -> None:
    """The folders load in transformers and hold other weights than the run began with."""
    names = ["actor", "critic", *(["actor_ema"] if averaged else [])]
    assert sorted(path.name for path in out.iterdir()) == sorted(names)
    for name in names:
        auto: Any = AutoModelForSequenceClassification if name == "critic" else AutoModelForCausalLM
        start = auto.from_pretrained(made / ("reward" if name == "critic" else "actor")).state_dict()
        end = auto.from_pretrained(out / name).state_dict()
        assert start.keys() == end.keys()
        moved = [
            key
            for key in start
            if not torch.equal(start[key].bfloat16(), end[key][: len(start[key])].bfloat16())
        ]
        assert any("self_attn.q_proj" in key for key in moved), name
        AutoTokenizer.from_pretrained(out / name)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("extra", [[], [*LORA, *EMA, *TEXT]], ids=["plain", "LoRA, average, text"])
def test_the_script_leaves_folders_that_hold_what_was_trained(
    made: Path, tmp_path: Path, extra: list[str]
) -> None:
    has_text = bool(extra)
    text = ["--unsupervised_dataset_name", str(made / "texts.jsonl")] if has_text else []
    _, trainer = step3.main([*flags(made, tmp_path / "out"), *extra, *text])
    expect_trained(tmp_path / "out", made, averaged=has_text)
    if has_text:  # two rollouts, two small batches each, two of them a step
        assert trainer._actor_steps.taken == trainer._critic_steps.taken == 2
    else:  # all that were planned
        assert trainer._actor_steps.taken == trainer.rlhf_engine.num_total_iters == 10


@pytest.mark.slow
def test_two_processes_train_one_model(tmp_path: Path) -> None:
    for kind in worker.CASES:
        alone = worker.train(kind, 0, 1)
        codes, said = run_group(["tests.rlhf.compat.worker", str(tmp_path), kind], size=2)
        assert codes == [0, 0], "\n".join(said)
        first, second = (torch.load(tmp_path / f"{kind}-{rank}.pt") for rank in range(2))
        assert first["losses"] == second["losses"]
        assert_near(torch.tensor(first["losses"]), alone["losses"], dtype=torch.float16)
        for name in ("rewards", "advantages"):
            together = [torch.cat(pair) for pair in zip(first[name], second[name], strict=True)]
            for found, expected in zip(together, alone[name], strict=True):
                assert_near(found, expected, dtype=torch.float16)
        for name in ("actor", "critic", "actor_ema"):
            assert first[name].keys() == alone[name].keys()
            for key, weight in alone[name].items():
                assert_near(first[name][key], weight, dtype=torch.float16)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_the_script_runs_in_two_processes(made: Path, tmp_path: Path, stage: int) -> None:
    stages = ["--actor_zero_stage", str(stage), "--critic_zero_stage", str(stage)]
    text = [*TEXT, "--unsupervised_dataset_name", str(made / "texts.jsonl")]
    extra = [*LORA, *EMA, *text] if stage else []
    extra += ["--inference_tp_size", "2"] if stage == 3 else []
    arguments = ["tests.rlhf.compat.step3", *flags(made, tmp_path / "out"), *stages, *extra]
    codes, said = run_group(arguments, size=2)
    assert codes == [0, 0], "\n".join(said)
    expect_trained(tmp_path / "out", made, averaged=bool(stage))


@pytest.mark.slow
def test_processes_that_have_not_met_are_refused(tmp_path: Path) -> None:
    codes, said = run_group(["tests.rlhf.compat.worker", str(tmp_path), "apart"], size=2)
    assert all(codes)
    assert all("has not joined the others" in text for text in said)


@pytest.mark.usefixtures("alone")
def test_prompts_are_padded_on_the_left(made: Path) -> None:
    tokenizer = byte_tokenizer()
    train, held_out = create_prompt_dataset(
        0, [str(made / "prompts.jsonl")], "0,0,1", "unused", 3, 1, tokenizer, 64
    )
    assert len(train) + len(held_out) == 20
    batch = DataCollatorRLHF(64, 1)([train[0], train[1]])
    assert batch["prompt"].shape == batch["prompt_att_mask"].shape == (2, 64)
    for ids, mask, row in zip(batch["prompt"], batch["prompt_att_mask"], (train[0], train[1]), strict=True):
        assert ids[mask.bool()].tolist() == row[0].tolist()
        assert mask.tolist() == sorted(mask.tolist())
        assert set(ids[~mask.bool()].tolist()) == {tokenizer.pad_token_id}
        assert "Human: Question" in tokenizer.decode(row[0])


@pytest.mark.usefixtures("alone")
def test_longer_prompts_are_left_out(made: Path) -> None:
    longest = len("\n\nHuman: Question 7?\n\nAssistant:")
    parts = create_prompt_dataset(
        0, [str(made / "prompts.jsonl")], "0,0,1", "unused", 3, 1, byte_tokenizer(), longest
    )
    assert sorted(len(row[0]) for part in parts for row in part) == [longest] * 10


@pytest.mark.usefixtures("alone")
def test_text_fills_rows_of_one_width(made: Path) -> None:
    args = arguments(
        unsupervised_dataset_name=str(made / "texts.jsonl"), unsupervised_dataset_config_name=None,
        max_prompt_seq_len=20, max_answer_seq_len=20,
    )  # fmt: skip
    for row in get_unsupervised_data(args, byte_tokenizer()):
        real = row["attention_mask"].bool()
        assert row["input_ids"].shape == row["labels"].shape == (40,)
        assert torch.equal(row["labels"][real], row["input_ids"][real])
        assert set(row["labels"][~real].tolist()) == {-100}


@pytest.mark.parametrize(
    ("split", "phase", "told"), [("2,4", 3, "'2,4' is not three"), ("2,4,4", 1, "train_phase = 1")]
)
def test_other_data_than_the_prompts_of_step_three_is_refused(split: str, phase: int, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        create_prompt_dataset(0, ["rm-static"], split, "unused", phase, 1, byte_tokenizer(), 64)


def test_the_rank_is_torchrun_s_unless_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    def rank(*given: str) -> int:
        return int(step3.parse([*given]).local_rank)

    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert rank() == 0
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert rank() == 1
    assert rank("--local_rank", "3") == 3
    assert add_config_arguments is step3.deepspeed.add_config_arguments
