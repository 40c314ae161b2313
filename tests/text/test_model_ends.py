"""A tokenizer that is loaded knows the ends that its model declares, as transformers would."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from dovetail.text.chat_format import ChatFormat
from dovetail.text.tokenizer import load_tokenizer
from tests.fakes import byte_tokenizer, tiny_model

END = 256
"""The tokenizer's own, which is also the template's."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model().save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    return tmp_path


def declare(file: Path, ends: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": ends}))


def declared(folder: Path) -> set[int]:
    """What transformers' generate would stop at."""
    ends = AutoModelForCausalLM.from_pretrained(folder).generation_config.eos_token_id
    return set(ends) if isinstance(ends, list) else {ends} - {None}


@pytest.mark.parametrize(
    ("file", "ends"),
    [
        ("generation_config.json", [256, 10]),
        ("generation_config.json", 10),
        ("generation_config.json", None),
        ("config.json", [10, 256]),
    ],
)
def test_the_ends_are_those_of_transformers_and_the_tokenizer_s(folder: Path, file: str, ends: Any) -> None:
    if file == "config.json":
        (folder / "generation_config.json").unlink()
    declare(folder / file, ends)
    assert set(ChatFormat(load_tokenizer(folder)).stop_token_ids) == {END} | declared(folder)


def test_what_generation_config_says_counts_and_not_what_config_says(folder: Path) -> None:
    declare(folder / "config.json", 11)
    declare(folder / "generation_config.json", 10)
    assert ChatFormat(load_tokenizer(folder)).stop_token_ids == (END, 10)


@pytest.mark.parametrize("ends", [[256, 5000, -1], "no id", {"a": 1}])
def test_ends_that_no_token_has_are_left_out(folder: Path, ends: Any) -> None:
    declare(folder / "generation_config.json", ends)
    assert ChatFormat(load_tokenizer(folder)).stop_token_ids == (END,)


def test_a_folder_with_a_tokenizer_alone_has_the_tokenizer_s_end(tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    assert ChatFormat(load_tokenizer(tmp_path)).stop_token_ids == (END,)
