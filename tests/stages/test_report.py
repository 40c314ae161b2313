"""The page of a run shows what its files say, to a browser that knows no network."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from dovetail.config.load import load
from dovetail.errors import CheckpointError
from dovetail.runs.run_folder import RunFolder
from dovetail.stages.report import EVERY, LiveReport, page_of, read_run, write_report

STEPS = 40


def run_folder(path: Path, *, gain: float = 1.0, **settings: Any) -> Path:
    """Make the folder of a run in the middle of PPO, after a finished SFT stage."""
    config = load("opt-125m", [f"{name}={value}" for name, value in settings.items()]).model_dump(mode="json")
    path.mkdir(parents=True)
    folder = RunFolder(path)
    folder.config.write_text(yaml.safe_dump(config))
    folder.model("sft").mkdir(parents=True)
    folder.mark_done("sft")
    folder.update_summary(
        {"sft": {"steps": 5, "held_out_loss": 1.25}, "seconds": {"sft": 83.0}, "planned_steps": {"ppo": 100}}
    )
    rows: list[dict[str, float]] = [{"step": n, "time": n, "sft/loss": 3.0 - n / 10} for n in range(1, 6)]
    for n in range(1, STEPS + 1):
        row = {
            "step": n,
            "time": 1000.0 + 2.0 * n,
            "ppo/score_mean": gain * n / STEPS,
            "ppo/score_std": 0.5,
            "ppo/kl_nats_per_answer": n / 10,
            "ppo/answer_tokens": 30.0,
            "ppo/collect_seconds": 1.5,
            "ppo/update_seconds": 0.5,
            "reward/brevity_mean": 0.1,
            "reward/truth_mean": 0.2,
        }
        rows.append(row | ({"ppo/held_out_reward": 0.3} if n % 20 == 0 else {}))
    folder.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def answers(path: Path, step: int, texts: dict[str, str], score: float) -> None:
    """Add the answers of an evaluation to the run."""
    (path / "ppo").mkdir(exist_ok=True)
    with (path / "ppo" / "held_out.jsonl").open("a") as file:
        for prompt, text in texts.items():
            row = {
                "step": step,
                "messages": [{"role": "user", "content": prompt}],
                "answer": text,
                "score": score,
            }
            file.write(json.dumps(row) + "\n")


def test_the_page_says_where_the_run_stands_and_when_it_will_end(tmp_path: Path) -> None:
    page = page_of([read_run(run_folder(tmp_path / "run"))], now=2000.0)
    assert page.state[0] == "Finished: sft in 1:23."
    # 60 rollouts are left, of 2 seconds each
    assert page.state[1].startswith("Stage 3: learning from rewards: step 40 of 100, about 2:00 left")


def test_curves_hold_the_rows_of_their_stage(tmp_path: Path) -> None:
    page = page_of([read_run(run_folder(tmp_path / "run"))], now=2000.0)
    charts = {(section.title, chart.title): chart for section in page.sections for chart in section.charts}
    sft = charts["Stage 1: supervised fine-tuning", "Loss"]
    assert [list(curve.y) for curve in sft.curves] == [[2.9, 2.8, 2.7, 2.6, 2.5]]
    reward = charts["Stage 3: learning from rewards", "Reward"]
    assert list(reward.curves[0].y) == [n / STEPS for n in range(1, STEPS + 1)]
    assert list(reward.curves[1].x) == [20, 40]
    assert set(reward.curves[0].spread or ()) == {0.5}
    functions = charts["Stage 3: learning from rewards", "Rewards by function"]
    assert [curve.name for curve in functions.curves] == ["brevity", "truth"]
    speed = charts["Stage 3: learning from rewards", "Throughput"]
    size = load("opt-125m", []).ppo.batch_size
    assert list(speed.curves[0].y) == pytest.approx([size * 30.0 / 2.0] * STEPS)


def test_settings_other_than_the_recipes_are_listed(tmp_path: Path) -> None:
    run = read_run(run_folder(tmp_path / "run", **{"ppo.kl_coefficient": 0.3, "seed": 7}))
    table = page_of([run], now=0.0).tables[-1]
    assert table.head[-1] == "Recipe opt-125m"
    recipe = load("opt-125m", [])
    assert [list(row) for row in table.rows] == [
        ["ppo.kl_coefficient", "0.3", str(recipe.ppo.kl_coefficient)],
        ["seed", "7", "0"],
    ]


def test_runs_are_compared_by_curve_result_and_setting(tmp_path: Path) -> None:
    paths = [run_folder(tmp_path / "one"), run_folder(tmp_path / "two", gain=2.0, **{"ppo.minibatches": 4})]
    page = page_of([read_run(path) for path in paths], now=0.0)
    reward = next(chart for section in page.sections for chart in section.charts if chart.title == "Reward")
    assert [curve.name for curve in reward.curves] == [
        "one, training", "one, held out", "two, training", "two, held out",
    ]  # fmt: skip
    assert reward.curves[2].y[-1] == 2.0
    results, settings = page.tables
    assert list(results.rows[1]) == ["sft: held out loss", "1.25", "1.25"]
    assert [list(row) for row in settings.rows] == [["ppo.minibatches", "1", "4"]]


def test_answers_to_the_same_prompts_stand_side_by_side(tmp_path: Path) -> None:
    path = run_folder(tmp_path / "run")
    answers(path, 0, {"Hello?": "No.", "Gone?": "Yes."}, -1.0)
    answers(path, 20, {"Hello?": "Well."}, 0.0)
    answers(path, 40, {"Hello?": "Hello!"}, 1.0)
    page = page_of([read_run(path)], now=0.0)
    assert page.sample_steps == (0, 40)
    assert [(s.prompt, s.before, s.before_score, s.after, s.after_score) for s in page.samples] == [
        ("Hello?", "No.", -1.0, "Hello!", 1.0)
    ]


def test_warnings_that_differ_in_figures_alone_are_one(tmp_path: Path) -> None:
    folder = RunFolder(run_folder(tmp_path / "run"))
    for text in ("rollout 3: entropy is 0.5", "disk is slow", "rollout 23: entropy is 0.25"):
        folder.keep_warning(text)
    warnings = page_of([read_run(folder.path)], now=0.0).warnings
    assert warnings[0] == "rollout 23: entropy is 0.25 (given 2 times, first: rollout 3: entropy is 0.5)"
    assert warnings[1] == "disk is slow"


class _Scripts(HTMLParser):
    """Collects the contents of the page's scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.scripts: list[str] = []
        self._is_within = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert not any(name in ("src", "href") and value and "//" in value for name, value in attrs)
        self._is_within = tag == "script"
        if self._is_within:
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self._is_within:
            self.scripts[-1] += data

    def handle_endtag(self, tag: str) -> None:
        self._is_within = False


def test_text_of_a_model_stays_text(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script><!-- \u2028 <img src=x onerror=alert(2)>"
    path = run_folder(tmp_path / "run")
    RunFolder(path).keep_warning(evil)
    for step in (0, 40):
        answers(path, step, {evil: evil}, 0.0)
    write_report([path], tmp_path / "page.html")
    found = _Scripts()
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    found.feed(text)
    assert len(found.scripts) == 3
    assert json.loads(found.scripts[0])["samples"][0]["after"] == evil
    assert "<img" not in re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)


def test_a_page_of_a_long_run_is_kept_up_to_date_and_a_short_run_leaves_none(tmp_path: Path) -> None:
    folder, now = RunFolder(run_folder(tmp_path / "run")), [0.0]
    live = LiveReport(folder, clock=lambda: now[0])
    live.write(1, {})
    live.close()
    assert not folder.report.exists()
    now[0] = EVERY
    live.write(2, {})
    first = folder.report.stat().st_mtime_ns
    live.write(3, {})
    assert folder.report.stat().st_mtime_ns == first
    live.close()
    assert folder.report.stat().st_mtime_ns > first


def test_a_page_that_cannot_be_written_ends_no_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, now = RunFolder(run_folder(tmp_path / "run")), [0.0]
    folder.metrics.write_text("not JSON\n")
    live = LiveReport(folder, clock=lambda: now[0])
    for minute in (1, 2):
        now[0] = minute * EVERY
        live.write(minute, {})
    said = capsys.readouterr().err
    assert said.count("cannot be written") == 1
    assert "metrics.jsonl, line 1: not JSON" in said


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is not the folder of a run: it has no config\.yaml"):
        read_run(tmp_path)


def test_a_row_that_is_being_written_is_left_out(tmp_path: Path) -> None:
    path = run_folder(tmp_path / "run")
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "ppo/score_mean": 9')
    assert read_run(path).curve("ppo", "ppo/score_mean")[0][-1] == STEPS


def test_the_command_names_the_file_it_wrote(tmp_path: Path) -> None:
    path = run_folder(tmp_path / "run")
    done = subprocess.run(
        [sys.executable, "-m", "dovetail", "report", str(path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(path / "report.html")
    assert (path / "report.html").is_file()


@pytest.mark.system
@pytest.mark.parametrize(("width", "scheme"), [(390, "light"), (1280, "dark")])
def test_a_browser_draws_every_chart_and_asks_no_server(tmp_path: Path, width: int, scheme: Any) -> None:
    sync_api = pytest.importorskip("playwright.sync_api")
    path = run_folder(tmp_path / "run")
    answers(path, 0, {"Hello?": "No.", "And you?": "What?"}, -1.0)
    answers(path, 40, {"Hello?": "Hello!", "And you?": "Fine."}, 1.0)
    write_report([path], tmp_path / "page.html")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        said: list[str] = []
        asked: list[str] = []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(f"file://{tmp_path / 'page.html'}")
        count = len(page.query_selector_all(".plot"))
        assert count > 5
        assert len(page.query_selector_all(".plot .plot-container")) == count
        page.fill("#find", "fine")
        assert page.inner_text("#shown") == "1 of 2 prompts"
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert said == []
        assert asked == [f"file://{tmp_path / 'page.html'}"]
        browser.close()
