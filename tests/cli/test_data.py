import json
from pathlib import Path

import pytest

from dovetail.cli.main import main
from tests.fakes import byte_tokenizer


def test_the_preview_marks_what_is_learnt_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    byte_tokenizer().save_pretrained(tmp_path / "model")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"q": f"question {i}", "a": f"answer {i}"}) + "\n" for i in range(5)))
    source = f"{{path: {rows}, prompt: q, response: a, held_out: false}}"
    changes = ["data.stage_split=[1, 0, 0]", f"data.cache_dir={tmp_path / 'cache'}"]
    with pytest.raises(SystemExit) as stopped:
        main(
            [
                "data",
                "preview",
                "opt-125m",
                *changes,
                "--actor-model",
                str(tmp_path / "model"),
                "--data",
                source,
                "-n",
                "2",
            ]
        )
    out = capsys.readouterr().out
    assert stopped.value.code == 0, out
    assert out.count("[[") == out.count("]]") == 2
    assert "question" in out
