"""Stage 3: PPO against the reward model (InstructGPT, section 3.5 and appendix C).

Responsible for: the loop: prompts -> collect -> update -> record -> evaluate -> save.
Not responsible for: what experience is (batches.py, rlhf/rollout.py), the losses (rlhf/update.py, maths/).

The tour of one step: this file, batches.py, rlhf/rollout.py, maths/, rlhf/update.py. See docs/a-ppo-step.md.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from transformers import PreTrainedModel

from dovetail.batches import PackedBatch
from dovetail.data.loader import BatchOrder
from dovetail.data.records import Message
from dovetail.evaluation.answers import Judge, evaluate_answers
from dovetail.evaluation.held_out import held_out_text_loss
from dovetail.parallel.shard import layout_of
from dovetail.rlhf.api import RLHFEngine
from dovetail.rlhf.rollout import collect
from dovetail.rlhf.update import next_kl_coefficient, update
from dovetail.stages.context import Context, StageReport, resume
from dovetail.stages.guard import Best, check_kl
from dovetail.stages.parts import actor_start, plain_text, prompts_of, rlhf_engine
from dovetail.stages.samples import SampleLog
from dovetail.stages.saving import save_model
from dovetail.telemetry.timing import Stopwatch
from dovetail.training.run_folder import RunFolder


def run(context: Context, judge: Judge | None = None) -> StageReport:
    """Train the actor against the reward model; leaves `ppo/model`, `ppo/model_ema` and `ppo/best`.

    judge: a second opinion on held-out answers, such as a gold score, recorded beside the reward.
    """
    config, folder, (model, chat) = context.config.ppo, context.folder, actor_start(context)
    prompts, held_out = prompts_of(context, chat, "train"), prompts_of(context, chat, "held_out")
    seed = context.config.seed
    order = BatchOrder(len(prompts), config.batch_size, seed)
    iterations = config.max_steps or max(1, len(prompts) // config.batch_size)
    total_steps = iterations * config.ppo_epochs * config.minibatches
    engine = rlhf_engine(model, chat, context, total_steps=total_steps)
    roles, learners, beta = engine.roles, engine.learners, config.kl_coefficient
    texts = plain_text(context, chat, roles.actor)
    best = Best(folder.model("best"), kl_limit=config.kl_limit)
    checkpoints = context.checkpoints("ppo", config)

    def state() -> dict[str, Any]:
        return {"engine": engine.state_dict(), "best": best.state_dict(), "kl_coefficient": beta}

    def load(state: Mapping[str, Any]) -> None:
        nonlocal beta
        engine.load_state_dict(state["engine"])
        best.load_state_dict(state["best"])
        beta = state["kl_coefficient"]

    held_out_stats = partial(judge_held_out, held_out, texts.held_out, engine, best, judge)
    sample = partial(collect, roles=roles, config=config, seed=seed)
    learn = partial(update, roles=roles, learners=learners, config=config, seed=seed, next_texts=texts.next)
    results: dict[str, float] = {}
    start = resume(checkpoints, load, "ppo", like=state())
    engine.check_parity(prompts)
    samples = SampleLog(folder.samples, start=start, every=config.print_samples_every, world=context.world)
    with (
        context.metrics("ppo", start=start) as metrics,
        context.progress("ppo", total=iterations, start=start) as progress,
        checkpoints,
    ):
        if start == 0:
            metrics.record(0, held_out_stats(0))
        for iteration in range(start, iterations):
            watch, done = Stopwatch(), iteration + 1
            with watch.phase("collect"), learners.parked():
                batch = [prompts[i] for i in order.batch(iteration)]
                collected = sample(batch, kl_coefficient=beta, iteration=iteration)
            with watch.phase("update"):
                report = learn(collected.experience, iteration=iteration)
            row = collected.stats | report.stats | watch.seconds("ppo") | gather_costs(roles.actor)
            row["ppo/kl_coefficient"] = beta
            beta = next_kl_coefficient(beta, collected, config, iteration=iteration)
            if done % config.eval_every == 0 or done == iterations:
                row |= (results := held_out_stats(done))
            metrics.record(done, row)
            samples.show_if_due(done, collected)
            progress.advance({"score": row["ppo/score_mean"], "kl": row["ppo/kl_nats_per_answer"]})
            check_kl(row, config, step=done)
            merit = best.reward if best.step == done else None
            context.save_if_due(checkpoints, state, config, done=done, total=iterations, merit=merit)
    save_actor(engine, folder)
    return StageReport(iterations, results or held_out_stats(iterations))


def judge_held_out(
    prompts: Sequence[Sequence[Message]],
    texts: PackedBatch | None,
    engine: RLHFEngine,
    best: Best,
    judge: Judge | None,
    step: int,
) -> dict[str, float]:
    """What held-out prompts and texts say of the actor after `step` rollouts; it is kept if it is the best so far."""
    judged = evaluate_answers(prompts, engine, judge)
    best.offer(judged.stats, engine, step=step)
    return judged.stats | held_out_text_loss(engine.roles, texts, engine.config.micro_batch_tokens)


def gather_costs(actor: PreTrainedModel) -> dict[str, float]:
    """What generation cost beside generating: nothing where the actor generates as it lies."""
    seconds, received = layout_of(actor).take_costs()
    return {"ppo/gather_seconds": seconds, "ppo/gather_bytes": float(received)} if seconds else {}


def save_actor(engine: RLHFEngine, folder: RunFolder) -> None:
    """The actor, and its float32 moving average as a float32 model folder of its own."""
    stops = engine.roles.chat.stop_token_ids
    save_model(engine.roles.actor, engine.tokenizer, folder.model("ppo"), stop_token_ids=stops)
    save_model(
        engine.roles.actor,
        engine.tokenizer,
        folder.model("ema"),
        stop_token_ids=stops,
        weights=engine.learners.ema.averages(),
    )
