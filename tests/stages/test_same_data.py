"""What a resumed stage must have in common with the one that was stopped."""

from collections.abc import Callable
from pathlib import Path

import pytest

from dovetail.config.run import RunConfig
from dovetail.errors import CheckpointError
from dovetail.stages import pipeline
from dovetail.stages.same_data import SameData
from dovetail.text.chat_format import ChatFormat
from tests.fakes import byte_tokenizer
from tests.stages.runs import tiny_run
from tests.text.tokenizers import CHATML

Edit = Callable[[list[str]], list[str]]
EDITS: dict[str, Edit] = {
    "added": lambda lines: [*lines, lines[0].replace("Say", "Sing")],
    "removed": lambda lines: lines[1:],
    "moved": lambda lines: lines[::-1],
    "changed": lambda lines: [lines[0].replace("!", "?"), *lines[1:]],
}


def begin_again(config: RunConfig) -> None:
    """Leave the last checkpoint of a finished stage, as if it had been stopped there."""
    (Path(config.output_dir) / "sft" / "done").unlink()


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("part", ["train", "held_out"])
def test_a_stage_does_not_go_on_with_other_rows(edit: str, part: str, tmp_path: Path) -> None:
    config = tiny_run(tmp_path, stages=("sft",))
    pipeline.run(config)
    begin_again(config)
    file = tmp_path / "data" / f"sft-{part}.jsonl"
    rows = file.read_text(encoding="utf-8")
    file.write_text("".join(EDITS[edit](rows.splitlines(keepends=True))), encoding="utf-8")
    with pytest.raises(CheckpointError, match="sft: the rows changed since the stage began") as caught:
        pipeline.run(config)
    assert str(Path(config.output_dir) / "sft") in str(caught.value.hint)
    file.write_text(rows, encoding="utf-8")
    pipeline.run(config)


@pytest.mark.parametrize("part", ["train", "held_out"])
def test_ppo_does_not_go_on_with_another_reference_answer(part: str, tmp_path: Path) -> None:
    judge = tmp_path / "judge.py"
    judge.write_text("def score(answers):\n    return [float(len(one.text)) for one in answers]\n")
    config = tiny_run(tmp_path, stages=("ppo",), ppo={"max_steps": 1, "reward_function": f"{judge}:score"})
    file = tmp_path / "data" / f"ppo-{part}.jsonl"
    rows = file.read_text(encoding="utf-8").replace("}", ', "answer": 4}')
    file.write_text(rows, encoding="utf-8")
    pipeline.run(config)
    (Path(config.output_dir) / "ppo" / "done").unlink()
    file.write_text(rows.replace(": 4}", ": 5}", 1), encoding="utf-8")
    with pytest.raises(CheckpointError, match="ppo: the rows changed since the stage began"):
        pipeline.run(config)


def test_a_stage_does_not_go_on_with_another_template(tmp_path: Path) -> None:
    formats = [
        ChatFormat(byte_tokenizer(), template) for template in (None, CHATML.replace("<|im_end|>", "</s>"))
    ]
    now, other = (SameData(tmp_path / "ppo", chat, "rows") for chat in formats)
    now.load_state_dict(now.state_dict())
    with pytest.raises(CheckpointError, match="ppo: the tokenizer or chat template changed"):
        other.load_state_dict(now.state_dict())
    moved = SameData(tmp_path / "ppo", formats[0], "row 2", "row 1")
    with pytest.raises(CheckpointError, match="ppo: the rows changed"):
        moved.load_state_dict(SameData(tmp_path / "ppo", formats[0], "row 1", "row 2").state_dict())
