from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from dovetail.config.data import DataConfig, SourceConfig
from dovetail.data.blend import load_stage
from dovetail.data.records import Comparison, Demonstration, Prompt
from dovetail.errors import DataError
from tests.data.files import assistant, config, pairs, questions, user, write_jsonl

STAGES = ("sft", "reward", "ppo")


def ids(rows: Any) -> set[str]:
    return {record.row_id for record in rows}


def test_stages_see_disjoint_rows_and_together_all(tmp_path: Path) -> None:
    data = config(tmp_path, write_jsonl(tmp_path / "a.jsonl", pairs(300)), max_eval_rows=300)
    seen = [ids(load_stage(data, stage, part)) for stage in STAGES for part in ("train", "held_out")]  # type: ignore[call-overload]
    assert sum(map(len, seen)) == len(set().union(*seen)) == 300


def test_each_stage_gets_its_kind_of_row(tmp_path: Path) -> None:
    data = config(tmp_path, write_jsonl(tmp_path / "a.jsonl", pairs(60)))
    assert all(isinstance(row, Demonstration) for row in load_stage(data, "sft", "train"))
    assert all(isinstance(row, Comparison) for row in load_stage(data, "reward", "train"))
    assert all(isinstance(row, Prompt) for row in load_stage(data, "ppo", "train"))
    assert load_stage(data, "sft", "train")[0].messages[-1]["content"].startswith("good")


def test_a_comparison_whose_prompt_has_an_empty_answer_is_not_imitated(tmp_path: Path) -> None:
    empty = {"prompt": [user("a"), assistant(""), user("b")], "chosen": "c", "rejected": "d"}
    path = write_jsonl(tmp_path / "a.jsonl", [empty, *pairs(3)])
    data = config(tmp_path, path, stage_split=(1, 0, 0), held_out_fraction=0)
    rows = load_stage(data, "sft", "train")
    assert len(rows) == 3
    assert rows.report.sources[0].unusable == 1
    judging = config(tmp_path, path, stage_split=(0, 1, 0), held_out_fraction=0)
    assert len(load_stage(judging, "reward", "train")) == 4


def test_a_row_keeps_its_stage_whatever_the_order_or_the_other_sources(tmp_path: Path) -> None:
    rows = pairs(100)
    alone = config(tmp_path, write_jsonl(tmp_path / "a.jsonl", rows))
    among = config(
        tmp_path,
        write_jsonl(tmp_path / "x.jsonl", pairs(50, "other")),
        write_jsonl(tmp_path / "b.jsonl", rows[::-1]),
        seed=9,
    )
    for stage in STAGES:
        assert ids(load_stage(alone, stage, "train")) <= ids(load_stage(among, stage, "train"))  # type: ignore[call-overload]


def test_demonstrations_go_to_the_two_stages_they_can_serve(tmp_path: Path) -> None:
    data = config(tmp_path, write_jsonl(tmp_path / "a.jsonl", questions(600)), held_out_fraction=0)
    sft, ppo = load_stage(data, "sft", "train"), load_stage(data, "ppo", "train")
    assert len(sft) + len(ppo) == 600
    assert abs(len(sft) - 200) < 4 * (600 * 2 / 9) ** 0.5


def test_a_source_for_one_stage_gives_it_all_rows(tmp_path: Path) -> None:
    only = SourceConfig(
        path=write_jsonl(tmp_path / "a.jsonl", questions(40)), stages=("sft",), held_out=False
    )
    data = config(tmp_path, only, write_jsonl(tmp_path / "b.jsonl", pairs(40, "r")), held_out_fraction=0)
    assert sum(row.source == only.path for row in load_stage(data, "sft", "train")) == 40
    assert not any(row.source == only.path for row in load_stage(data, "ppo", "train"))


def places(data: DataConfig, *stages: str) -> dict[str, set[tuple[str, str]]]:
    """Return the stages and parts of each question."""
    found: dict[str, set[tuple[str, str]]] = {}
    for stage in stages:
        for part in ("train", "held_out"):
            for row in load_stage(data, stage, part):  # type: ignore[call-overload]
                found.setdefault(row.messages[0]["content"], set()).add((stage, part))
    return found


def test_all_rows_of_a_prompt_are_in_one_stage_and_part(tmp_path: Path) -> None:
    answers = [{"prompt": f"q {i % 60}", "chosen": f"a {i}", "rejected": f"b {i}"} for i in range(600)]
    found = places(
        config(tmp_path, write_jsonl(tmp_path / "a.jsonl", answers), held_out_fraction=0.3), *STAGES
    )
    assert len(found) == 60
    assert all(len(where) == 1 for where in found.values())
    assert {part for where in found.values() for _, part in where} == {"train", "held_out"}


def test_a_prompt_keeps_its_place_in_every_form_and_file(tmp_path: Path) -> None:
    def written(name: str, *rows: dict[str, Any]) -> DataConfig:
        path = write_jsonl(tmp_path / name, rows)
        return config(tmp_path, path, held_out_fraction=0.3, stage_split=(1, 0, 1))

    numbers = range(200)
    whole = [[user(f"q {i}"), assistant("a")] for i in numbers]
    compared = written("a.jsonl", *({"chosen": w, "rejected": [w[0], assistant("b")]} for w in whole))
    shown = written("b.jsonl", *({"prompt": f"q {i}", "response": f"c {i}"} for i in reversed(numbers)))
    asked = written("c.jsonl", *({"prompt": [user(f"q {i}")]} for i in numbers))
    there = places(compared, "sft", "ppo")
    assert len(there) == 200
    assert places(shown, "sft", "ppo") == there
    assert {q: {part for _, part in where} for q, where in places(asked, "ppo").items()} == {
        q: {part for _, part in where} for q, where in there.items()
    }


def test_rows_are_divided_one_by_one_if_asked(tmp_path: Path) -> None:
    rows = [{"prompt": "q", "response": f"a {i}"} for i in range(400)]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError, match="400 of them answer one prompt"):
        places(config(tmp_path, path), "sft", "ppo")
    (apart,) = places(config(tmp_path, path, split_by="row", held_out_fraction=0.2), "sft", "ppo").values()
    assert len(apart) == 4


def test_a_prompt_with_most_of_the_rows_is_named(tmp_path: Path) -> None:
    rows = [{"prompt": f"q {max(i, 30)}", "response": f"a {i}"} for i in range(60)]
    source = SourceConfig(path=write_jsonl(tmp_path / "a.jsonl", rows), stages=("sft",))
    (line,) = load_stage(config(tmp_path, source, held_out_fraction=0), "sft", "train").report.lines()
    assert (
        "60 rows read, 31 of them answer one prompt (they stay together; data.split_by=row divides them)"
        in line
    )
    (line,) = load_stage(
        config(tmp_path, source, held_out_fraction=0, split_by="row"), "sft", "train"
    ).report.lines()
    assert "one prompt" not in line


def test_too_few_held_out_rows_are_told_with_the_remedy(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", pairs(48))
    few = load_stage(config(tmp_path, SourceConfig(path=path, stages=("sft",))), "sft", "held_out")
    assert len(few) < 5
    (note,) = few.report.notes
    assert f"{len(few)} of 48 rows are held out" in note
    fraction = float(note.partition("data.held_out_fraction=")[2].partition(",")[0])
    for settled in (
        config(tmp_path, SourceConfig(path=path, stages=("sft",)), held_out_fraction=2 * fraction),
        config(tmp_path, SourceConfig(path=path, stages=("sft",)), held_out_fraction=0),
        config(tmp_path, SourceConfig(path=path, stages=("sft",), held_out=True)),
        config(tmp_path, SourceConfig(path=path, stages=("sft",), held_out=False)),
    ):
        assert load_stage(settled, "sft", "held_out").report.notes == ()


def test_held_out_rows_are_none_all_or_a_fraction(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", pairs(200))
    for held_out, expected in ((True, 200), (False, 0)):
        data = config(tmp_path, SourceConfig(path=path, held_out=held_out, stages=("sft",)))
        assert len(load_stage(data, "sft", "held_out")) == expected
    data = config(tmp_path, SourceConfig(path=path, stages=("sft",)), held_out_fraction=0.25)
    assert 20 < len(load_stage(data, "sft", "held_out")) < 80


def test_at_most_so_many_rows_are_held_out_and_always_the_same(tmp_path: Path) -> None:
    rows = pairs(200)
    chosen = []
    for name, order in (("a.jsonl", rows), ("b.jsonl", rows[::-1])):
        source = SourceConfig(path=write_jsonl(tmp_path / name, order), held_out=True, stages=("sft",))
        chosen.append(ids(load_stage(config(tmp_path, source, max_eval_rows=15), "sft", "held_out")))
    assert chosen[0] == chosen[1]
    assert len(chosen[0]) == 15


@pytest.mark.parametrize("weights", [(1, 1), (3, 1), (1, 5), (None, 3)])
def test_a_blend_has_the_proportions_of_its_weights(weights: tuple[Any, Any], tmp_path: Path) -> None:
    sizes = (400, 100)
    sources = [
        SourceConfig(
            path=write_jsonl(tmp_path / f"{i}.jsonl", pairs(size, f"s{i}")), weight=w, stages=("sft",)
        )
        for i, (size, w) in enumerate(zip(sizes, weights, strict=True))
    ]
    rows = load_stage(config(tmp_path, *sources, held_out_fraction=0), "sft", "train")
    counts = Counter(row.source for row in rows)
    share = (weights[0] or 1) / sum(w or 1 for w in weights)
    assert len(rows) == 500
    assert abs(counts[sources[0].path] - 500 * share) <= 1
    for source, size in zip(sources, sizes, strict=True):  # rows repeat as evenly as they can
        repeats = Counter(row.row_id for row in rows if row.source == source.path)
        fewest = counts[source.path] // size
        assert set(repeats.values()) <= {fewest, fewest + 1}


def test_without_weights_every_row_occurs_once(tmp_path: Path) -> None:
    data = config(tmp_path, *(write_jsonl(tmp_path / f"{n}.jsonl", pairs(n, str(n))) for n in (30, 70)))
    rows = load_stage(data, "ppo", "train")
    assert len(ids(rows)) == len(rows)


def test_the_blend_follows_its_seed(tmp_path: Path) -> None:
    path, other = (write_jsonl(tmp_path / f"{n}.jsonl", pairs(n, str(n))) for n in (200, 60))
    sources = (SourceConfig(path=path, weight=1, stages=("ppo",)), SourceConfig(path=other, weight=1))
    one, same, different = (
        [row.row_id for row in load_stage(config(tmp_path, *sources, seed=seed), "ppo", "train")]
        for seed in (1, 1, 2)
    )
    assert one == same != different


def test_ties_are_left_out_of_the_reward_model_and_counted(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{i}", "a": "x", "b": "y", "w": 1.5 if i % 4 == 0 else 1} for i in range(200)]
    source = SourceConfig(
        path=write_jsonl(tmp_path / "a.jsonl", rows),
        prompt="prompt", answers=("a", "b"), preference="w", stages=("reward",), held_out=False,
    )  # fmt: skip
    loaded = load_stage(config(tmp_path, source), "reward", "train")
    (counts,) = loaded.report.sources
    assert (len(loaded), counts.rows, counts.unusable, counts.used) == (150, 200, 50, 150)


def test_bad_rows_stop_or_are_counted(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [*questions(50), {"prompt": "q"}])
    with pytest.raises(DataError, match="line 51: there is no column response"):
        load_stage(config(tmp_path, path), "sft", "train")
    report = load_stage(config(tmp_path, path, bad_rows="skip"), "sft", "train").report
    assert (report.sources[0].read, report.sources[0].bad) == (51, 1)
    assert any("line 51" in line for line in report.lines())


def test_plain_text_comes_from_pretraining_alone(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": f"t {i}"} for i in range(20)])
    data = config(tmp_path, pretraining=(SourceConfig(path=path),), held_out_fraction=0)
    assert [row.text for row in load_stage(data, "text", "train")] == [f"t {i}" for i in range(20)]
    with pytest.raises(DataError, match="holds plain text, which no stage learns from by itself"):
        load_stage(config(tmp_path, path), "sft", "train")
    talk = write_jsonl(tmp_path / "b.jsonl", questions(3))
    with pytest.raises(DataError, match=r"listed under data\.pretraining, but names no column of plain text"):
        load_stage(config(tmp_path, pretraining=(SourceConfig(path=talk),)), "text", "train")


def test_a_stage_without_rows_says_what_it_needs(tmp_path: Path) -> None:
    data = config(tmp_path, write_jsonl(tmp_path / "a.jsonl", questions(20)))
    with pytest.raises(DataError) as caught:
        load_stage(data, "reward", "train")
    assert "no row is left to train the stage reward on: " in caught.value.message
    assert "20 rows read, 0 for this stage" in caught.value.message
    assert "it needs comparisons: chosen and rejected" in str(caught.value.hint)
    assert len(load_stage(data, "reward", "held_out")) == 0


def test_no_source_at_all_is_an_error_that_names_the_setting(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.blend names no source for the stage sft"):
        load_stage(config(tmp_path), "sft", "train")
    with pytest.raises(DataError, match=r"data\.pretraining names no source"):
        load_stage(config(tmp_path), "text", "train")


def test_stage_rows_are_a_sequence(tmp_path: Path) -> None:
    data = config(tmp_path, write_jsonl(tmp_path / "a.jsonl", questions(30)))
    rows = load_stage(data, "sft", "train")
    assert rows[:3] == [rows[0], rows[1], rows[2]]
    assert list(rows)[-1] == rows[-1]


def test_the_other_columns_of_a_row_reach_ppo_and_no_other_stage(tmp_path: Path) -> None:
    rows = [row | {"difficulty": number} for number, row in enumerate(pairs(60))]
    data = config(tmp_path, write_jsonl(tmp_path / "a.jsonl", rows))
    seen = load_stage(data, "ppo", "train")
    assert len(seen) > 5
    for record in seen:
        (row,) = (row for row in rows if row["prompt"] == record.messages[-1]["content"])
        assert record.row == {name: row[name] for name in ("chosen", "rejected", "difficulty")}
    assert all(
        record.row == {}
        for record in (*load_stage(data, "sft", "train"), *load_stage(data, "reward", "train"))
    )
