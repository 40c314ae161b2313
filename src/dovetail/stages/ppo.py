"""Stage 3: PPO against the reward model (InstructGPT, section 3.5 and appendix C).

Responsible for: the loop: prompts -> generate experience -> update -> record -> evaluate -> save.
Not responsible for: what experience is (batches.py, rlhf/rollout.py), the losses (rlhf/update.py, maths/).

The tour of one step: this file, rlhf/api.py (PPOTrainer), batches.py, rlhf/rollout.py, maths/, rlhf/update.py. See
docs/a-ppo-step.md.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from transformers import PreTrainedModel

from dovetail.batches import PackedBatch
from dovetail.config.stages import PpoConfig
from dovetail.data.records import Prompt
from dovetail.errors import TrainingStopped
from dovetail.parallel.shard import sharding_of
from dovetail.rlhf.algorithms.named import algorithm_named
from dovetail.rlhf.api import PPOTrainer, RLHFEngine
from dovetail.rlhf.evaluation import Judge, evaluate_answers, held_out_text_loss
from dovetail.rlhf.rehearsal import rehearse_ppo
from dovetail.rlhf.tasks.subject import judge_by_tasks
from dovetail.runs.run_folder import RunFolder
from dovetail.stages.context import Context, StageReport, resume
from dovetail.stages.guard import Best, Guard
from dovetail.stages.models import actor_start, rlhf_engine
from dovetail.stages.prompt_queue import PromptQueue
from dovetail.stages.rescue import saved_on_error
from dovetail.stages.rows import plain_text, prompts_of, training_tasks
from dovetail.stages.same_data import SameData
from dovetail.stages.samples import KEPT, KEPT_HELD_OUT, AnswerLog, show
from dovetail.stages.saving import save_model
from dovetail.stages.score_scale import ScoreScale
from dovetail.telemetry.log import say
from dovetail.telemetry.timing import Stopwatch
from dovetail.text.content_hash import content_hash
from dovetail.training.rehearsal import probe_of


def run(context: Context, judge: Judge | None = None) -> StageReport:
    """Train the actor against the reward model; leaves `ppo/model`, `ppo/model_ema` and `ppo/best`.

    judge: a second opinion on held-out answers, such as a gold score, recorded beside the reward.
    """
    config, folder = context.config.ppo, context.folder
    model, chat = actor_start(context)
    prompts, held_out = prompts_of(context, chat, "train"), prompts_of(context, chat, "held_out")
    algorithm = algorithm_named(context.config.algorithm, context.config.policy, config)
    queue = PromptQueue(prompts, seed=context.config.seed, pass_score=config.curriculum_score)
    iterations = rollouts_of(config, len(prompts), algorithm.answers_per_prompt)
    total_steps = iterations * config.ppo_epochs * config.minibatches
    engine = rlhf_engine(model, chat, context, algorithm, total_steps=total_steps)
    trainer = PPOTrainer(engine)
    texts = plain_text(context, chat, engine.roles.actor)
    tasks = training_tasks(context.config)
    guard, best = Guard(config), Best(folder.model("best"), kl_limit=config.kl_limit)
    checkpoints = context.checkpoints("ppo", config)
    read = (
        *(content_hash(prompt.messages, prompt.row) for prompt in (*prompts, *held_out)),
        texts.fingerprint,
    )
    data = SameData(folder.path / "ppo", chat, *read)
    scale = ScoreScale(engine, is_on=config.standardise_scores)
    parts: dict[str, Any] = {
        "data": data, "queue": queue, "scale": scale, "trainer": trainer, "guard": guard, "best": best
    }  # fmt: skip
    state, load = partial(state_of, parts), partial(load_into, parts)

    def judged(step: int) -> dict[str, float]:
        found = judge_held_out(held_out, texts.held_out, engine, best, judge, step, held_out_log)
        return found | judge_by_tasks(tasks, engine)

    results: dict[str, float] = {}
    start = resume(checkpoints, load, "ppo", like=state())
    engine.check_parity(prompts)
    if start < iterations and (probe := probe_of(context.device)) is not None:
        rehearse_ppo(engine, prompts, probe)
    scale.measure(prompts)
    samples = AnswerLog(folder.samples, start=start, world=context.world)
    held_out_log = AnswerLog(folder.held_out, start=start, world=context.world)
    with (
        context.metrics("ppo", start=start) as metrics,
        context.progress("ppo", total=iterations, start=start) as progress,
        checkpoints,
        saved_on_error(checkpoints, state, start=start, world=context.world) as place,
    ):
        if start == 0:
            metrics.record(0, judged(0))
        for iteration in range(start, iterations):
            watch, done = Stopwatch(), iteration + 1
            with watch.phase("collect"):
                asked = queue.take(config.batch_size // algorithm.answers_per_prompt)
                collected = trainer.generate_experience(asked, more=queue.take)
            place.done = None
            asking = queue.settle(collected.sampled_scores_S)
            with watch.phase("update"):
                report = trainer.update(collected, next_texts=texts.next)
            place.done = done
            row = (
                collected.stats
                | asking
                | report.stats
                | watch.seconds("ppo")
                | gather_costs(engine.roles.actor)
            )
            if done % config.eval_every == 0 or done == iterations:
                row |= (results := judged(done))
            metrics.record(done, row)
            if done % config.print_samples_every == 0 and context.world.is_first:
                scores = collected.experience.scores_S.tolist()
                samples.keep(done, collected.answers[:KEPT], scores[:KEPT])
                show(collected.answers, scores)
            progress.advance({"score": row["ppo/score_mean"], "kl": row["ppo/kl_nats_per_answer"]})
            guard.check(row, step=done)
            metric = best.objective if best.step == done else None
            context.save_if_due(checkpoints, state, config, done=done, total=iterations, metric=metric)
    expect_learnt(engine)
    save_actor(engine, folder)
    return StageReport(iterations, results or judged(iterations))


def state_of(parts: Mapping[str, Any]) -> dict[str, Any]:
    """Return what each part wants saved."""
    return {name: part.state_dict() for name, part in parts.items()}


def load_into(parts: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Give each part what it saved."""
    for name, part in parts.items():
        part.load_state_dict(state[name])


def rollouts_of(config: PpoConfig, num_prompts: int, answers_per_prompt: int = 1) -> int:
    """Return the number of rollouts, `max_steps` or one pass over the prompts, and say what the batch leaves over."""
    if config.max_steps is not None:
        return config.max_steps
    asked = config.batch_size // answers_per_prompt
    rollouts = max(1, num_prompts // asked)
    left = num_prompts - rollouts * asked
    if left > 0:
        say(f"ppo: {rollouts} rollouts of {config.batch_size}; {left} of {num_prompts} prompts are left over")
    elif left < 0:
        say(
            f"ppo: one rollout of {config.batch_size}; some of the {num_prompts} prompts are answered more than once"
        )
    return rollouts


def judge_held_out(
    prompts: Sequence[Prompt],
    texts: PackedBatch | None,
    engine: RLHFEngine,
    best: Best,
    judge: Judge | None,
    step: int,
    log: AnswerLog,
) -> dict[str, float]:
    """Judge the actor after `step` rollouts by held-out prompts and texts; it is kept if it is the best so far."""
    judged = evaluate_answers(prompts, engine, judge)
    log.keep(step, judged.answers[:KEPT_HELD_OUT], judged.scores[:KEPT_HELD_OUT])
    best.offer(judged.stats, engine, step=step)
    return judged.stats | held_out_text_loss(engine.roles, texts, engine.config.micro_batch_tokens)


def gather_costs(actor: PreTrainedModel) -> dict[str, float]:
    """Return what generation cost beside generating; empty where the actor generates with its weights in place."""
    seconds, received = sharding_of(actor).layout.take_costs()
    return {"ppo/gather_seconds": seconds, "ppo/gather_bytes": float(received)} if seconds else {}


def expect_learnt(engine: RLHFEngine) -> None:
    """Raise TrainingStopped if the actor is what it was at the start, because no rollout had anything to learn from."""
    if engine.learners.actor_step == 0:
        if engine.config.cut_off_answers != "leave_out":
            raise TrainingStopped(
                "training ends with the actor as it began: no answer of any rollout was learnt from, because all "
                "answers to each prompt had the same reward, which policy.drop_equal_groups = true leaves out, or none "
                "reached policy.min_reward",
                hint="take prompts that the actor answers now well, now badly, raise policy.answers_per_prompt, or "
                "look at the answers in ppo/samples.jsonl and at what scores them",
            )
        raise TrainingStopped(
            "PPO ends with the actor as it began: no answer of any rollout was learnt from, because all of them "
            f"reached ppo.sampling.max_new_tokens = {engine.config.sampling.max_new_tokens} and "
            f"ppo.cut_off_answers = {engine.config.cut_off_answers}",
            hint="raise ppo.sampling.max_new_tokens, fine-tune the actor on answers that end, or set "
            "ppo.cut_off_answers=keep_score",
        )


def save_actor(engine: RLHFEngine, folder: RunFolder) -> None:
    """Save the actor, and its float32 moving average as a float32 model folder of its own."""
    stops = engine.roles.chat.stop_token_ids
    save_model(engine.roles.actor, engine.tokenizer, folder.model("ppo"), stop_token_ids=stops)
    save_model(
        engine.roles.actor,
        engine.tokenizer,
        folder.model("ema"),
        stop_token_ids=stops,
        weights=engine.learners.ema.averages(),
    )
