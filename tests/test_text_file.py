from __future__ import annotations

from pathlib import Path

import pytest

from dovetail.cli.run_settings import Flags, resolve
from dovetail.launch.hostfile import read_hostfile
from dovetail.serving.keys import hash_of, read_keys
from dovetail.text.tokenizer import read_template
from dovetail.text_file import read_text, seeming_encoding

MARK = "\ufeff"


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    for text in ("plain", f"{MARK}plain"):
        (tmp_path / "a.txt").write_text(text, encoding="utf-8")
        assert read_text(tmp_path / "a.txt") == "plain"


def test_every_kind_of_text_file_may_have_one(tmp_path: Path) -> None:
    contents = {
        "template.jinja": "{{ messages }}",
        "hosts": "worker-0 slots=2\n",
        "keys": f"ann sha256:{hash_of('k')}\n",
        "recipe.yaml": f"actor: {{path: x/y}}\noutput_dir: {tmp_path}/run\n",
        "data.yaml": "blend: [a.jsonl]\n",
    }
    for name, text in contents.items():
        (tmp_path / name).write_text(MARK + text, encoding="utf-8")
    assert read_template(str(tmp_path / "template.jinja")) == "{{ messages }}"
    assert [host.name for host in read_hostfile(tmp_path / "hosts")] == ["worker-0"]
    assert read_keys(tmp_path / "keys")
    config = resolve(str(tmp_path / "recipe.yaml"), (), Flags(data=[str(tmp_path / "data.yaml")])).config
    assert config.data.blend[0].path == "a.jsonl"


@pytest.mark.parametrize(
    ("text", "encoding", "seems"),
    [
        ("你好世界", "gb18030", "gb18030"),
        ("你好", "gbk", "gb18030"),
        ("hello", "utf-16", "utf-16"),
        ("hello", "utf-16-le", "utf-16-le"),
        ("hello", "utf-16-be", "utf-16-be"),
        ("café, olé.", "cp1252", None),
    ],
)
def test_other_encodings_are_told_by_their_bytes(text: str, encoding: str, seems: str | None) -> None:
    assert seeming_encoding(text.encode(encoding)) == seems
