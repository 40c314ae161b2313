from pathlib import Path

import pytest

from dovetail.errors import ConfigError
from dovetail.launch.hostfile import Host, read_hostfile


def written(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "hosts"
    file.write_text(text, encoding="utf-8")
    return file


def test_machines_come_in_their_order_and_comments_are_left_out(tmp_path: Path) -> None:
    file = written(tmp_path, "# rack 1\nworker-1.cluster slots=8\n\n  10.0.0.7\tslots=4  # the small one\n")
    assert read_hostfile(file) == [Host("worker-1.cluster", 8), Host("10.0.0.7", 4)]


@pytest.mark.parametrize(
    ("text", "line", "found"),
    [
        ("a slots=8\nb slot=8\n", 2, "'b slot=8'"),
        ("a slots=8\nb slots=\n", 2, "'b slots='"),
        ("a\n", 1, "'a'"),
        ("a slots=8 max=9\n", 1, "max=9"),
        ("a slots=-1\n", 1, "slots=-1"),
        ("a slots=0\n", 1, "a has 0 slots"),
        ("#\na slots=8\n\na slots=8\n", 4, "a is already in line 2"),
    ],
)
def test_a_typo_is_named_with_file_and_line(tmp_path: Path, text: str, line: int, found: str) -> None:
    file = written(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        read_hostfile(file)
    assert caught.value.message.startswith(f"{file} line {line}: ")
    assert found in caught.value.message
    assert caught.value.hint


def test_a_file_without_machines_or_none_at_all_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="names no machine"):
        read_hostfile(written(tmp_path, "# nobody\n"))
    with pytest.raises(ConfigError, match="cannot be read"):
        read_hostfile(tmp_path / "absent")
