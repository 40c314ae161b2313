"""An open run."""

from datetime import datetime
from pathlib import Path

from dovetail.stages.context import open_run
from dovetail.text.chat_format import ChatFormat
from tests.stages.runs import tiny_run
from tests.text.tokenizers import CHATML, byte_level

DATED = "{{ 'It is ' + strftime_now('%d %B %Y %H:%M:%S') }}" + CHATML


def test_templates_of_a_run_tell_the_time_at_which_it_began(tmp_path: Path) -> None:
    config = tiny_run(tmp_path)
    with open_run(config) as context:
        begun = datetime.fromisoformat(
            next(line for line in context.folder.config.read_text().splitlines() if "begun" in line).split()[
                -1
            ]
        )
        chat = ChatFormat(byte_level(DATED))
        first = chat.tokenizer.decode(chat.prompt_ids([{"role": "user", "content": "hi"}]))
        assert f"It is {begun:%d %B %Y %H:%M:%S}" in first
    file = Path(config.output_dir) / "config.yaml"
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace(begun.isoformat(), "2020-02-29T12:00:00"), encoding="utf-8")
    with open_run(config):  # on a later day
        later = ChatFormat(byte_level(DATED))
        shown = later.tokenizer.decode(later.prompt_ids([{"role": "user", "content": "hi"}]))
    assert "It is 29 February 2020 12:00:00" in shown
