from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dovetail.config.data import SourceConfig
from dovetail.data.forms import record_of
from dovetail.data.records import Comparison, Demonstration, Record, Text
from dovetail.data.registry import registry, resolve, short_names
from dovetail.errors import DataError
from tests.data.files import user

# One row of each set, in the columns that its makers publish.
PUBLISHED: dict[str, dict[str, Any]] = {
    "Dahoas/rm-static": {"prompt": "\n\nHuman: Q\n\nAssistant:", "chosen": " A", "rejected": " B"},
    "Dahoas/full-hh-rlhf": {"prompt": "\n\nHuman: Q\n\nAssistant:", "chosen": " A", "rejected": " B"},
    "Dahoas/synthetic-instruct-gptj-pairwise": {"prompt": "Q", "chosen": "A", "rejected": "B"},
    "yitingxie/rlhf-reward-datasets": {
        "prompt": "\n\nHuman: Q\n\n", "chosen": "Assistant: A", "rejected": "Assistant: B",
    },
    "openai/webgpt_comparisons": {
        "question": {"dataset": "eli5", "full_text": "Q"},
        "answer_0": "B [1] (sic)", "score_0": -1.0, "answer_1": "A [2, 3]", "score_1": 1.0,
    },
    "stanfordnlp/SHP": {"history": "Q", "human_ref_A": "B", "human_ref_B": "A", "labels": 0},
    "pvduy/sharegpt_alpaca_oa_vicuna_format": {"prompt": "USER: Q ASSISTANT:", "label": "A"},
    "local/jsonfile": {"prompt": "Q", "chosen": "A", "rejected": "B"},
    "wangrui6/Zhihu-KOL": {"INSTRUCTION": "Q", "RESPONSE": "A", "SOURCE": "Zhihu", "METADATA": "{}"},
    "Cohere/miracl-zh-queries-22-12": {
        "query": "Q", "positive_passages": [{"text": "A"}], "negative_passages": [{"text": "B"}, {"text": "C"}],
    },
    "Hello-SimpleAI/HC3-Chinese": {"question": "Q", "human_answers": ["A", "C"], "chatgpt_answers": ["B"]},
    "mkqa-Chinese": {"queries": {"zh_cn": "Q"}, "answers": {"zh_cn": [{"text": "A"}]}},
    "mkqa-Japanese": {"queries": {"ja": "Q"}, "answers": {"ja": [{"text": "A"}]}},
    "Cohere/miracl-ja-queries-22-12": {
        "query": "Q", "positive_passages": [{"text": "A"}], "negative_passages": [],
    },
    "lmqg/qg_jaquad": {"question": "Q", "sentence": "A", "paragraph": "P"},
    "lmqg/qag_jaquad": {"questions": ["Q", "R"], "answers": ["a"], "paragraph": "A"},
}  # fmt: skip


def test_the_sixteen_sets_are_known_by_short_and_full_name() -> None:
    assert len(short_names()) == 16
    assert set(PUBLISHED) <= set(registry())
    assert all(registry()[name] for name in short_names())


def record(name: str) -> Record:
    return record_of(PUBLISHED[name], resolve(SourceConfig(path=name))[0], name)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_row_as_published_becomes_a_question_with_its_answers(name: str) -> None:
    found = record(name)
    if isinstance(found, Comparison):
        assert found.messages == (user("Q"),)
        assert found.answers[found.best()] == "A"
        assert sorted(found.answers) in (["A", "B"], ["A", "B (sic)"], ["A"])
    else:
        assert isinstance(found, Demonstration)
        assert [turn["content"] for turn in found.messages] == ["Q", "A"]


def test_rows_of_jsonfile_may_be_transcripts() -> None:
    row = {"prompt": "Human: Q\n\nAssistant:", "chosen": "A", "rejected": "B"}
    found = record_of(row, resolve(SourceConfig(path="local/jsonfile"))[0], "local/jsonfile")
    assert isinstance(found, Comparison)
    assert (found.messages, found.answers) == ((user("Q"),), ("A", "B"))


def test_a_set_with_rows_of_its_own_for_evaluation_gives_two_sources() -> None:
    train, held_out = resolve(SourceConfig(path="rm-static", weight=2))
    assert (train.path, train.split, train.held_out, train.weight) == ("Dahoas/rm-static", "train", False, 2)
    assert (held_out.split, held_out.held_out, held_out.chosen) == ("test", True, "chosen")


def test_what_the_user_sets_wins() -> None:
    (one,) = resolve(SourceConfig(path="rm-static", split="test", limit=10))
    assert (one.split, one.limit, one.held_out) == ("test", 10, None)
    (two,) = resolve(SourceConfig(path="synthetic-instruct", prompt="prompt", response="chosen"))
    assert (two.path, two.response, two.chosen) == ("Dahoas/synthetic-instruct-gptj-pairwise", "chosen", None)


def test_other_names_stay_as_they_are() -> None:
    source = SourceConfig(path="rows.jsonl")
    assert resolve(source) == (source,)


def test_a_file_of_a_registered_name_is_that_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "webgpt").mkdir()
    assert resolve(SourceConfig(path="webgpt"))[0].path == "webgpt"


def described_by_llama_factory(folder: Path, **entry: Any) -> str:
    """Write a dataset_info.json with one set, and return the path of the set."""
    (folder / "dataset_info.json").write_text(json.dumps({"mine": entry}))
    return f"{folder / 'dataset_info.json'}:mine"


ALPACA = {"instruction": "Q", "input": "", "output": "A", "history": [["Hi", "Hello"]]}
TURNS = [{"from": "human", "value": "Q"}]


@pytest.mark.parametrize(
    ("entry", "row", "expected"),
    [
        ({"columns": {"history": "history"}}, ALPACA, Demonstration),
        (
            {"columns": {"prompt": "q", "query": "more", "response": "a", "system": "s", "history": "h"}},
            {"q": "Q", "a": "A", "s": "Be kind.", "h": []},
            Demonstration,
        ),
        (
            {"formatting": "sharegpt", "columns": {"messages": "conversations"}},
            {"conversations": [*TURNS, {"from": "gpt", "value": "A"}]},
            Demonstration,
        ),
        (
            {"ranking": True, "columns": {"prompt": "q", "chosen": "good", "rejected": "bad"}},
            {"q": "Q", "good": "A", "bad": "B"},
            Comparison,
        ),
        (
            {"formatting": "sharegpt", "ranking": True, "columns": {"messages": "conversations"}},
            {
                "conversations": TURNS,
                "chosen": {"from": "gpt", "value": "A"},
                "rejected": {"from": "gpt", "value": "B"},
            },
            Comparison,
        ),
        ({"columns": {"prompt": "body"}}, {"body": "Some text."}, Text),
    ],
)
def test_sets_that_llama_factory_describes_are_read(
    entry: dict[str, Any], row: dict[str, Any], expected: type, tmp_path: Path
) -> None:
    path = described_by_llama_factory(tmp_path, file_name="rows.jsonl", **entry)
    (source,) = resolve(SourceConfig(path=path))
    assert source.path == str(tmp_path / "rows.jsonl")
    record = record_of(row, source, "t")
    assert isinstance(record, expected)
    if isinstance(record, Comparison):
        assert (record.messages, record.answers, record.better_than) == (
            (user("Q"),),
            ("A", "B"),
            ((0, 1, 0.0),),
        )
    if isinstance(record, Demonstration):
        earlier = ["Hi", "Hello"] if row is ALPACA else ["Be kind."] if "s" in row else []
        assert [turn["content"] for turn in record.messages] == [*earlier, "Q", "A"]


def test_a_set_of_the_hub_and_its_number_of_rows_are_taken_from_the_description(tmp_path: Path) -> None:
    path = described_by_llama_factory(
        tmp_path, hf_hub_url="me/rows", subset="small", split="dev", num_samples=5
    )
    (source,) = resolve(SourceConfig(path=path, weight=2.0))
    assert (source.path, source.name, source.split, source.limit, source.weight) == (
        "me/rows",
        "small",
        "dev",
        5,
        2.0,
    )


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("{folder}/dataset_info.json:other", "describes no set other; it has mine"),
        ("{folder}/no/dataset_info.json:mine", "cannot be read"),
        ("{folder}/dataset_info.json:mine", "kto_tag: single answers"),
    ],
)
def test_a_set_that_is_not_described_is_named(path: str, words: str, tmp_path: Path) -> None:
    described_by_llama_factory(tmp_path, file_name="rows.jsonl", columns={"prompt": "q", "kto_tag": "label"})
    with pytest.raises(DataError, match=words):
        resolve(SourceConfig(path=path.format(folder=tmp_path)))
