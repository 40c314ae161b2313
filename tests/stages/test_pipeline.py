"""All three stages on tiny models: what a run leaves, and that anybody can load it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast

from dovetail.batches import pack
from dovetail.errors import ModelError
from dovetail.model.forward import last_scores
from dovetail.model.load import load_scalar_model
from dovetail.model.scalar import scalar_model_from
from dovetail.parallel.world import World
from dovetail.stages import models as stage_models
from dovetail.stages import pipeline
from dovetail.stages.context import open_run
from dovetail.text.chat_format import ChatFormat
from dovetail.text.tokenizer import load_tokenizer
from tests.fakes import END, PAD, tiny_model
from tests.stages.runs import save_tiny_model, tiny_run, write_rows

NAMES = ("opt-post-norm", "gpt2", "gpt-neox", "llama", "qwen2", "opt")
TWO_STEPS: dict[str, Any] = {stage: {"max_steps": 2} for stage in ("sft", "reward", "ppo")}
QUESTION = "\n\nHuman: Say tea\n\nAssistant: tea!"


@pytest.fixture(scope="module", params=NAMES)
def run_of_each(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of each architecture."""
    config = tiny_run(tmp_path_factory.mktemp("run"), request.param, **TWO_STEPS)
    pipeline.run(config)
    return Path(config.output_dir)


@pytest.mark.parametrize("model", ["sft/model", "ppo/model", "ppo/model_ema", "ppo/best"])
def test_transformers_loads_each_actor_and_lets_it_write(run_of_each: Path, model: str) -> None:
    loaded, info = AutoModelForCausalLM.from_pretrained(run_of_each / model, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ids = load_tokenizer(run_of_each / model)(QUESTION, return_tensors="pt").input_ids
    written = loaded.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
    assert written.shape[1] > ids.shape[1]


def test_transformers_reads_the_same_scores_off_the_reward_model_as_we_do(run_of_each: Path) -> None:
    folder = run_of_each / "reward/model"
    theirs, info = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert theirs.config.num_labels == 1
    tokenizer = load_tokenizer(folder)
    texts = [QUESTION + END, "\n\nHuman: Say why not over there\n\nAssistant: no" + END]
    padded = tokenizer(texts, return_tensors="pt", padding=True)
    with torch.no_grad():
        their_scores = theirs.eval()(
            input_ids=padded.input_ids, attention_mask=padded.attention_mask
        ).logits.squeeze(-1)
        ours = load_scalar_model(folder, dtype=torch.float32, device="cpu", seed=0, pad_token_id=None)
        sequences = [tokenizer(text).input_ids for text in texts]
        our_scores = last_scores(ours, pack(sequences, [[False] * len(ids) for ids in sequences]))
    torch.testing.assert_close(their_scores, our_scores, atol=1e-5, rtol=1e-5)


def test_the_summary_tells_the_results_of_every_stage(run_of_each: Path) -> None:
    summary = json.loads((run_of_each / "summary.json").read_text())
    assert summary.keys() == {"sft", "reward", "ppo", "seconds", "planned_steps"}
    assert summary["planned_steps"] == {"sft": 2, "reward": 2, "ppo": 2}
    assert summary["seconds"].keys() == {"sft", "reward", "ppo"}
    assert all(summary[stage]["steps"] == 2 for stage in ("sft", "reward", "ppo"))
    assert {"centred_by", "centring_disturbance"} <= summary["reward"].keys()
    assert {"held_out_reward", "held_out_kl_nats_per_answer"} <= summary["ppo"].keys()


@pytest.mark.parametrize(
    ("stage", "metric", "sign"),
    [("sft", "held_out_loss", -1), ("reward", "held_out_loss", -1), ("ppo", "held_out_objective", 1)],
)
def test_a_checkpoint_knows_how_good_its_model_was(
    run_of_each: Path, stage: str, metric: str, sign: int
) -> None:
    lines = (run_of_each / "metrics.jsonl").read_text().splitlines()
    measured = [
        (row["step"], sign * row[f"{stage}/{metric}"])
        for row in map(json.loads, lines)
        if f"{stage}/{metric}" in row
    ]
    found = {}
    for folder in (run_of_each / stage / "checkpoints").iterdir():
        manifest = json.loads((folder / "manifest.json").read_text())
        found[manifest["step"]] = manifest.get("metric")
    step, metric = measured[-1]
    is_best = stage != "ppo" or metric > measured[0][1]  # of step 0, which has no checkpoint
    assert (step, found[1]) == (2, None)
    assert found[2] == (metric if is_best else None)


def test_the_average_is_a_float32_model_of_its_own(run_of_each: Path) -> None:
    actor = load_file(run_of_each / "ppo/model/model.safetensors")
    average = load_file(run_of_each / "ppo/model_ema/model.safetensors")
    assert average.keys() == actor.keys()
    assert {tensor.dtype for tensor in average.values()} == {torch.float32}
    assert any(not torch.equal(average[name], actor[name]) for name in actor)


def test_every_stage_changes_its_model(run_of_each: Path) -> None:
    sft = load_file(run_of_each / "sft/model/model.safetensors")
    ppo = load_file(run_of_each / "ppo/model/model.safetensors")
    assert sft.keys() == ppo.keys()
    assert any(not torch.equal(sft[name], ppo[name]) for name in sft)


def test_the_average_of_a_half_precision_run_is_float32(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, precision="bf16", **TWO_STEPS)
    pipeline.run(config)
    run = Path(config.output_dir)
    assert dtypes(run / "ppo/model") == {torch.bfloat16}
    assert dtypes(run / "ppo/model_ema") == {torch.float32}
    assert AutoModelForCausalLM.from_pretrained(run / "ppo/model_ema").dtype == torch.float32


def test_adapters_of_actor_and_reward_model_train_alone_and_are_merged(tmp_path: Path) -> None:
    plain = tiny_run(tmp_path)
    lora = {"lora": {"rank": 4, "alpha": 8.0}}
    config = tiny_run(tmp_path, actor=lora, reward_model=lora, **TWO_STEPS)
    pipeline.run(config)
    run, start = Path(config.output_dir), load_file(Path(plain.actor.path) / "model.safetensors")
    for model in ("sft/model", "ppo/model", "ppo/model_ema"):
        trained = load_file(run / model / "model.safetensors")
        assert trained.keys() == start.keys()
        assert torch.equal(trained["model.embed_tokens.weight"], start["model.embed_tokens.weight"])
        changed = "model.layers.0.self_attn.q_proj.weight"
        assert not torch.equal(trained[changed], start[changed])
    assert (run / "sft/model_adapter").is_dir()
    assert (run / "ppo/model_adapter").is_dir()
    assert AutoModelForSequenceClassification.from_pretrained(run / "reward/model").config.num_labels == 1


def test_a_reward_function_stands_in_for_the_reward_model(tmp_path: Path) -> None:
    file = tmp_path / "judge.py"
    file.write_text("def score(answers):\n    return [7.0 for answer in answers]\n")
    config = tiny_run(
        tmp_path, stages=("sft", "ppo"), ppo={"max_steps": 2, "reward_function": f"{file}:score"}
    )
    pipeline.run(config)
    summary = json.loads((Path(config.output_dir) / "summary.json").read_text())
    assert summary["ppo"]["held_out_reward"] == 7.0


def test_a_reward_function_sees_the_row_of_the_prompt_in_training_and_held_out(tmp_path: Path) -> None:
    file, seen = tmp_path / "judge.py", tmp_path / "seen"
    file.write_text(
        "def score(answers):\n"
        f"    with open({str(seen)!r}, 'a') as log:\n"
        "        for one in answers:\n"
        "            print(one.messages[-1]['content'], one.row['answer'], one.row['level'], sep='|', file=log)\n"
        "    return [float(len(one.text)) for one in answers]\n"
    )
    blend = []
    for part, start in (("train", 0), ("held_out", 10)):
        rows = [
            {"prompt": f"Say {i}", "answer": f"It is {i}", "level": i % 3} for i in range(start, start + 8)
        ]
        path = write_rows(tmp_path / f"{part}.jsonl", rows)
        blend.append({"path": str(path), "stages": ["ppo"], "held_out": part == "held_out"})
    ppo = {"max_steps": 2, "reward_function": f"{file}:score"}
    pipeline.run(tiny_run(tmp_path, stages=("ppo",), data={"blend": blend}, ppo=ppo))
    lines = {tuple(line.split("|")) for line in seen.read_text().splitlines()}
    assert lines == {(f"Say {i}", f"It is {i}", str(i % 3)) for i in (*range(8), *range(10, 18))}


def test_several_rewards_are_summed_and_shown(tmp_path: Path) -> None:
    for name, value in (("one", 3.0), ("two", -1.0)):
        (tmp_path / f"{name}.py").write_text(f"def score(completion):\n    return {value}\n")
    rows = [{"prompt": f"Say {i}", "answer": f"{i}"} for i in range(8)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    terms = [
        "number",
        {"function": f"{tmp_path}/one.py:score", "weight": 2},
        {"function": f"{tmp_path}/two.py:score", "weight": 0.5},
    ]
    blend = [{"path": str(path), "stages": ["ppo"], "held_out": False}]
    config = tiny_run(
        tmp_path, stages=("ppo",), data={"blend": blend}, ppo={"max_steps": 2, "reward_function": terms}
    )
    pipeline.run(config)
    for row in map(json.loads, (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()):
        if "ppo/score_mean" in row:
            assert (row["reward/score_mean"], row["reward/score_3_mean"]) == (3.0, -1.0)
            assert row["reward/number_failures"] == row["reward/score_failures"] == 0.0
            assert row["ppo/score_mean"] == pytest.approx(row["reward/number_mean"] + 2 * 3.0 - 0.5)


def test_a_reward_function_adds_to_the_reward_model(tmp_path: Path) -> None:
    file = tmp_path / "judge.py"
    file.write_text("def score(answers):\n    return [4.0 for answer in answers]\n")
    ppo = {"max_steps": 2, "reward_function": f"{file}:score", "reward_function_weight": 0.5}
    config = tiny_run(tmp_path, stages=("reward", "ppo"), ppo=ppo)
    pipeline.run(config)
    first = rows_of(config.output_dir, "ppo/held_out_reward")[0]
    other = tiny_run(tmp_path, stages=("reward", "ppo"), output_dir=str(tmp_path / "without"))
    pipeline.run(other)
    assert first == pytest.approx(rows_of(other.output_dir, "ppo/held_out_reward")[0] + 2.0, abs=1e-4)


def test_mixture_training_changes_the_actor(tmp_path: Path) -> None:
    trained = []
    for coefficient in (0.0, 2.0):
        config = tiny_run(
            tmp_path,
            stages=("sft", "reward", "ppo"),
            output_dir=str(tmp_path / f"run-{coefficient}"),
            ppo={"max_steps": 2, "ptx_coefficient": coefficient, "ptx_batch_size": 3},
        )
        pipeline.run(config)
        trained.append(load_file(Path(config.output_dir) / "ppo/model/model.safetensors"))
    without, mixed = trained
    assert any(not torch.equal(without[name], mixed[name]) for name in mixed)


def test_a_reward_model_with_another_tokenizer_scores_the_text(tmp_path: Path) -> None:
    other = save_tiny_model(tmp_path / "other", "gpt2", tokenizer=reversed_byte_tokenizer(), seed=5)
    config = tiny_run(tmp_path, reward_model={"path": str(other)}, **TWO_STEPS)
    pipeline.run(config)
    run = Path(config.output_dir)
    assert (
        load_tokenizer(run / "reward/model").get_vocab()["a"]
        != load_tokenizer(run / "ppo/model").get_vocab()["a"]
    )
    sample = json.loads((run / "ppo/samples.jsonl").read_text().splitlines()[0])
    assert sample["score"] == pytest.approx(score_of(run / "reward/model", sample), abs=1e-3)


def test_the_reward_model_can_start_from_the_sft_model(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, stages=("sft", "reward"), reward={"max_steps": 1, "start_from": "sft"})
    pipeline.run(config)
    assert (Path(config.output_dir) / "reward/model/model.safetensors").exists()


def test_a_reward_model_that_starts_from_the_sft_model_has_its_backbone(tmp_path: Path) -> None:
    still = {"start_from": "sft", "max_steps": 1, "optimizer": {"learning_rate": 0.0}}
    config = tiny_run(tmp_path, stages=("sft", "reward"), reward=still)
    pipeline.run(config)
    sft, reward = (
        load_file(Path(config.output_dir) / f"{stage}/model/model.safetensors") for stage in ("sft", "reward")
    )
    assert all(torch.equal(reward[name], sft[name]) for name in reward.keys() - {"score.weight"})


def test_ppo_runs_alone_from_finished_models(tmp_path: Path) -> None:
    first = tiny_run(tmp_path, stages=("reward",), **TWO_STEPS)
    pipeline.run(first)
    reward = Path(first.output_dir) / "reward/model"
    config = tiny_run(
        tmp_path,
        stages=("ppo",),
        reward_model={"path": str(reward)},
        output_dir=str(tmp_path / "alone"),
        **TWO_STEPS,
    )
    pipeline.run(config)
    assert (tmp_path / "alone/ppo/model/model.safetensors").exists()


def test_ppo_loads_the_revision_and_the_code_of_the_settings_and_of_finished_stages_what_they_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[tuple[str, str | None, bool]] = []

    def noted(load: Any) -> Any:
        def call(path: str, *, revision: str | None, trust_remote_code: bool, **rest: Any) -> Any:
            loaded.append((Path(path).name, revision, trust_remote_code))
            return load(path, **rest)  # a folder has no revisions

        return call

    named = {"revision": "v2", "trust_remote_code": True}
    config = tiny_run(tmp_path, stages=("reward",), actor=named, reward_model=named, **TWO_STEPS)
    finished = Path(config.output_dir) / "reward/model"
    for name in ("load_causal_lm", "load_scalar_model"):
        monkeypatch.setattr(stage_models, name, noted(getattr(stage_models, name)))
    pipeline.run(config)
    pipeline.run(config.model_copy(update={"stages": ("ppo",)}))
    alone = {"path": str(finished), **named}
    other = str(tmp_path / "alone")
    config = tiny_run(
        tmp_path, stages=("ppo",), actor=named, reward_model=alone, output_dir=other, **TWO_STEPS
    )
    pipeline.run(config)
    pretrained = ("model-llama", "v2", True)
    assert loaded == [pretrained, pretrained, ("model", None, True), pretrained, ("model", "v2", True)]


def test_without_held_out_rows_a_run_goes_through(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, **TWO_STEPS)
    blend = tuple(source for source in config.data.blend if not source.held_out)
    config = config.model_copy(update={"data": config.data.model_copy(update={"blend": blend})})
    pipeline.run(config)
    run = Path(config.output_dir)
    assert (run / "ppo/model/model.safetensors").exists()
    # Nothing was measured: no reward, and no model that would be the best by it.
    assert "held_out_reward" not in (run / "metrics.jsonl").read_text()
    assert not (run / "ppo/best").exists()


def test_ppo_refuses_a_reward_model_whose_scores_would_be_noise(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, stages=("ppo",), **TWO_STEPS)
    with pytest.raises(ModelError, match="model-llama is a language model without a reward head"):
        pipeline.run(config)


def test_scores_are_centred_on_the_best_answers_of_rows_from_all_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage_models, "CENTRING_ROWS", 3)
    packed: list[list[list[int]]] = []

    def noted(sequences: Any, masks: Any) -> Any:
        packed.append(sequences)
        return pack(sequences, masks)

    monkeypatch.setattr(stage_models, "pack", noted)
    # Of row n the answers are [n, 0], [n, 1] and [n, 2]; as data tells: 0 beats 1, 2 beats both.
    rows = [([[n, 0], [n, 1], [n, 2]], [(0, 1, 0.0), (2, 0, 0.0), (2, 1, 0.0)]) for n in range(9)]
    with open_run(tiny_run(tmp_path)) as context:
        model = scalar_model_from(tiny_model(), seed=0, pad_token_id=None)
        stage_models.centre_on_demonstrations(model, rows, context)
    assert packed[0] == [[0, 2], [4, 2], [8, 2]]


def test_whether_a_stage_has_finished_is_what_the_first_process_sees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shared folder may show others what it was a minute ago, and they must not load another model."""
    with open_run(tiny_run(tmp_path)) as context:
        monkeypatch.setattr(World, "from_first", lambda world, own: True)
        assert not context.folder.is_done("sft")
        assert context.is_done("sft")


def dtypes(folder: Path) -> set[torch.dtype]:
    return {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()}


def rows_of(run: str, name: str) -> list[float]:
    rows = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    return [row[name] for row in rows if name in row]


def score_of(folder: Path, sample: dict[str, Any]) -> float:
    """What transformers alone says of a kept answer."""
    tokenizer = load_tokenizer(folder)
    turn = {"role": "assistant", "content": sample["answer"]}
    ids = ChatFormat(tokenizer).conversation([*sample["messages"], turn])[0]
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        return float(model(input_ids=torch.tensor([ids])).logits[0, 0])


def reversed_byte_tokenizer() -> PreTrainedTokenizerFast:
    """The bytes of `byte_tokenizer`, numbered from the other end."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=True)
    core = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=END, pad_token=PAD)
