"""The guide for people who come from DeepSpeed-Chat speaks of every flag, and of settings that exist."""

import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from dovetail.config.model import LoraConfig, ModelConfig
from dovetail.config.run import RunConfig
from tests.rlhf.compat.step3 import SWITCHES, VALUES

GUIDE = (Path(__file__).parents[3] / "docs/from-deepspeed-chat.md").read_text(encoding="utf-8")

THREE_STEPS = (
    """step actor-model reward-model actor-zero-stage reward-zero-stage output-dir deployment-type num-gpus"""
)

STEPS_1_AND_2 = """data_path data_split sft_only_data_path data_output_path model_name_or_path num_padding_at_beginning
per_device_train_batch_size per_device_eval_batch_size max_seq_len learning_rate weight_decay num_train_epochs
gradient_accumulation_steps lr_scheduler_type num_warmup_steps seed output_dir local_rank gradient_checkpointing offload
dropout dtype zero_stage lora_dim lora_module_name only_optimize_lora lora_learning_rate compute_fp32_loss
enable_tensorboard tensorboard_path add_eot_token eot_token print_loss eval_interval eval_iters deepspeed
deepspeed_config"""

STEP_3 = [*VALUES, *SWITCHES, "data_path", "lr_scheduler_type", "deepspeed", "deepspeed_config"]

SECTIONS = GUIDE.split("\n## ")[1:]


def in_first_column(section: str) -> list[str]:
    cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    return [flag for cell in cells for flag in re.findall(r"`--([\w-]+)", cell)]


@pytest.mark.parametrize(
    ("section", "flags"),
    [(0, THREE_STEPS.split()), (1, STEPS_1_AND_2.split()), (3, STEP_3)],
    ids=["train.py", "steps 1 and 2", "step 3"],
)
def test_every_flag_has_its_line_once(section: int, flags: list[str]) -> None:
    assert sorted(in_first_column(SECTIONS[section])) == sorted(flags)


def names_of(kind: type[BaseModel], name: str) -> list[str]:
    """`name`, or what is under it if that is a group of settings."""
    return [f"{name}.{field}" for field in kind.model_fields]


def settings() -> set[str]:
    found: set[str] = set(RunConfig.model_fields)
    groups = {name: field.annotation for name, field in RunConfig.model_fields.items()}
    groups |= {"reward_model": ModelConfig, "actor.lora": LoraConfig, "reward_model.lora": LoraConfig}
    for group, kind in groups.items():
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            for name, field in kind.model_fields.items():
                found.add(f"{group}.{name}")
                if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                    found.update(names_of(field.annotation, f"{group}.{name}"))
    return found


def test_every_setting_that_is_named_exists() -> None:
    named = re.findall(r"`((?:\w+\.)+\w+)(?:=[^`]*)?`", GUIDE)
    groups = set(RunConfig.model_fields)
    wanted = {name for name in named if name.partition(".")[0] in groups}
    assert len(wanted) > 40
    assert wanted - settings() == set()
