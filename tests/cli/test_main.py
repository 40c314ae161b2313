import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from dovetail import __version__
from dovetail.cli.main import main
from dovetail.config.load import dump, load
from dovetail.config.run import RunConfig
from dovetail.errors import ConfigError, DataError, RunInterrupted
from dovetail.parallel.world import ALONE, World
from tests.stages.runs import tiny_run

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command in this process: exit code, stdout, stderr."""

    def run_command(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        captured = capsys.readouterr()
        return int(stopped.value.code or 0), captured.out, captured.err

    return run_command


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch) -> list[RunConfig]:
    """Stands in for the stages: the configurations they were run with."""
    ran: list[RunConfig] = []

    def run(config: RunConfig, *, is_checked: bool) -> World:
        ran.append(config)
        return ALONE

    module = ModuleType("dovetail.stages.pipeline")
    module.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "dovetail.stages.pipeline", module)
    import dovetail.stages

    monkeypatch.setattr(dovetail.stages, "pipeline", module, raising=False)
    return ran


COMMANDS = ["train", "sft", "reward", "ppo", "demo", "plan", "chat", "export", "doctor", "data", "data preview",
            "label", "label start", "label export", "label invite"]  # fmt: skip


def test_help_lists_every_command(run: Run) -> None:
    code, out, _ = run("--help")
    assert code == 0
    for command in COMMANDS:
        assert command.split()[0] in out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(run: Run, command: str) -> None:
    code, out, _ = run(*command.split(), "--help")
    assert code == 0
    assert "Usage:" in out


def test_brackets_in_examples_survive_the_markup(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert "data.blend='[my_pairs.jsonl]'" in run("--help")[1]
    assert "[rm-static:2, my_pairs.jsonl:1]" in run("train", "--help")[1]


def test_the_version_is_the_package_s(run: Run) -> None:
    assert run("--version")[:2] == (0, f"dovetail {__version__}\n")


def test_help_does_not_wait_for_torch() -> None:
    script = (
        "import sys\nfrom dovetail.cli.main import main\n"
        "try:\n    main(['train', '--help'])\nexcept SystemExit:\n    pass\n"
        "print([m for m in ('torch', 'transformers', 'datasets', 'peft') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_train_runs_all_stages_and_names_the_chat(run: Run, pipeline: list[RunConfig]) -> None:
    code, out, _ = run("train", "opt-125m", "sft.epochs=2", "--output-dir", "runs/mine", "--seed", "3")
    assert code == 0
    assert pipeline == [load("opt-125m", ["sft.epochs=2", "output_dir=runs/mine", "seed=3"])]
    assert "dovetail chat runs/mine" in out


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_a_stage_runs_alone(run: Run, pipeline: list[RunConfig], stage: str) -> None:
    assert run(stage, "opt-125m")[0] == 0
    assert [config.stages for config in pipeline] == [(stage,)]


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_a_stage_takes_the_flags_of_the_whole_run(run: Run, pipeline: list[RunConfig], stage: str) -> None:
    flags = ["--actor-model", "1.3b", "--reward-model", "350m", "--output-dir", "runs/one", "--seed", "3"]
    flags += ["--deployment-type", "single_gpu", "--actor-zero-stage", "3", "--reward-zero-stage", "2"]
    run("train", *flags)
    run(stage, *flags)
    whole, alone = pipeline
    assert alone == whole.model_copy(update={"stages": (stage,)})


@pytest.mark.parametrize("command", [("reward",), ("train", "--step", "2")])
def test_a_reward_model_alone_needs_no_actor(
    run: Run, pipeline: list[RunConfig], command: tuple[str, ...]
) -> None:
    assert run(*command, "--reward-model", "350m", "seed=1")[0] == 0
    assert pipeline[0].reward_start().path == "facebook/opt-350m"
    assert pipeline[0].output_dir == "runs/opt-350m"


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_a_reward_model_beside_a_recipe_leaves_actor_and_folder_to_the_recipe(
    run: Run, pipeline: list[RunConfig], stage: str
) -> None:
    assert run(stage, "opt-1.3b", "--reward-model", "facebook/opt-125m")[0] == 0
    (config,) = pipeline
    assert (config.actor.path, config.output_dir) == ("facebook/opt-1.3b", "runs/opt-1.3b")
    assert config.reward_start().path == "facebook/opt-125m"


def test_steps_are_given_as_a_list(run: Run, pipeline: list[RunConfig]) -> None:
    run("train", "--actor-model", "350m", "--step", "1", "3", "--data", "a.jsonl", "b.jsonl:2", "seed=7")
    assert pipeline[0].stages == ("sft", "ppo")
    assert [source.path for source in pipeline[0].data.blend] == ["a.jsonl", "b.jsonl"]
    assert pipeline[0].seed == 7


def test_the_one_line_script_is_the_same_command(pipeline: list[RunConfig], run: Run) -> None:
    command = ["--actor-model", "facebook/opt-1.3b", "--reward-model", "facebook/opt-350m", "--num-gpus", "1"]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "train.py", *command, "--dry-run"],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == ConfigError.exit_code  # without network none of the models can be had
    run("train", *command)
    text = done.stdout.partition("# stage 1")[0]
    from dovetail.config.load import check, parse_value

    assert check(parse_value(text, "dry run")) == pipeline[0]
    assert "recipe opt-1.3b" in done.stderr


def test_a_dry_run_prints_what_would_run_and_touches_nothing(
    run: Run, pipeline: list[RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump(tiny_run(tmp_path)))
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    code, out, _ = run("train", str(recipe), "--dry-run", "sft.optimizer.learning_rate=2e-5")
    assert code == 0
    assert "learning_rate: 2.0e-05" in out
    assert out.count("  runs\n") == 3
    assert out.splitlines()[-1].startswith("# checked: data, models")
    assert not pipeline
    assert sorted(tmp_path.rglob("*")) == before


def test_a_dry_run_prints_all_settings_and_then_every_problem_of_the_run(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump(tiny_run(tmp_path)))
    wrong = [
        "sft.max_steps=7",
        f"ppo.reward_function={tmp_path}/none.py:score",
        "ppo.sampling.max_new_tokens=99999",
    ]
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    code, out, err = run("train", str(recipe), *wrong, "device=cuda", "--num-gpus", "2", "--dry-run")
    assert code == ConfigError.exit_code
    assert "max_steps: 7" in out
    assert "# checked" not in out
    assert err.startswith("error: 3 problems")
    for found in (
        "none.py:score",
        "context of the actor is 512",
        "has 1 GPU",
    ):
        assert found in err


@pytest.mark.parametrize(
    "command",
    [
        ("data.blend=[nowhere.jsonl]",),
        ("actor.path=./nowhere",),
        ("device=cuda:7",),
        ("reward_model.path=x/y",),
    ],
)
def test_a_run_and_its_dry_run_refuse_with_the_same_words_and_leave_no_folder(
    run: Run, tmp_path: Path, command: tuple[str, ...]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump(tiny_run(tmp_path)))
    code, _, err = run("train", str(recipe), *command, "--dry-run")
    assert code == ConfigError.exit_code
    for processes in ("1", "2"):
        assert run("train", str(recipe), *command, "--num-gpus", processes)[::2] == (code, err)
    assert not (tmp_path / "run").exists()


def test_a_dry_run_tells_finished_and_begun_stages(run: Run, tmp_path: Path) -> None:
    for folder in ("sft/model", "reward/checkpoints/step-00000010"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "sft" / "done").write_text("")
    _, out, _ = run("train", "opt-125m", "--output-dir", str(tmp_path), "--step", "2", "--dry-run")
    lines = [line for line in out.splitlines() if line.startswith("# stage")]
    assert lines[0].endswith("finished before: skipped")
    assert lines[1].endswith("continues from its last checkpoint")
    assert lines[2].endswith("not requested")


def test_a_dry_run_of_dpo_lists_its_two_stages(run: Run, tmp_path: Path) -> None:
    command = ("train", "opt-125m", "algorithm=dpo", "--output-dir", str(tmp_path), "--step", "dpo")
    _, out, _ = run(*command, "--dry-run")
    lines = [line for line in out.splitlines() if line.startswith("# stage")]
    assert [line.split()[2] for line in lines] == ["1", "2"]
    assert lines[0].endswith("not requested")
    assert lines[1].endswith("runs")


def test_an_error_is_message_and_hint_without_a_traceback(run: Run) -> None:
    code, out, err = run("train", "opt-125m", "sft.epoch=1")
    assert code == 2
    assert out == ""
    assert err.splitlines() == [
        "error: override 'sft.epoch=1': sft.epoch is not a setting",
        "hint: did you mean sft.epochs?",
    ]


def test_an_error_of_a_stage_is_shown_the_same_way(
    run: Run, pipeline: list[RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(config: RunConfig, *, is_checked: bool) -> None:
        raise DataError("pairs.jsonl line 7: not JSON", hint="repair the line")

    monkeypatch.setattr(sys.modules["dovetail.stages.pipeline"], "run", fail)
    assert run("train", "opt-125m") == (
        2, "", "error: pairs.jsonl line 7: not JSON\nhint: repair the line\n",
    )  # fmt: skip


def test_a_run_that_a_signal_ended_says_where_it_goes_on_and_has_a_code_of_its_own(
    run: Run, pipeline: list[RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    def end(config: RunConfig, *, is_checked: bool) -> None:
        raise RunInterrupted("sft: ended by SIGTERM after step 2 of 3, which is saved")

    monkeypatch.setattr(sys.modules["dovetail.stages.pipeline"], "run", end)
    code, out, err = run("train", "opt-125m")
    assert (code, out) == (75, "")
    assert err == (
        "\nsft: ended by SIGTERM after step 2 of 3, which is saved; the same command goes on from there\n"
    )


def test_ctrl_c_leaves_without_a_traceback(
    run: Run, pipeline: list[RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(config: RunConfig, *, is_checked: bool) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["dovetail.stages.pipeline"], "run", interrupt)
    code, _, err = run("train", "opt-125m")
    assert code == 130
    assert "Traceback" not in err
    assert "continues from the last checkpoint" in err


def test_a_flag_that_does_not_exist_is_refused(run: Run) -> None:
    code, _, err = run("train", "--actor-modle", "x")
    assert code == 2
    assert "--actor-model" in err


def test_the_exit_code_does_not_depend_on_anybody_reading_the_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "dovetail", "train", "no-such-recipe", "--dry-run"]
    done = subprocess.run(command, stderr=writer, stdout=subprocess.DEVNULL, timeout=60, check=False)
    os.close(writer)
    assert done.returncode == ConfigError.exit_code
