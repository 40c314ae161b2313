"""Plan a run on a machine: memory of each phase, seconds of each step, what makes it fit, what it costs.

Responsible for: which models a run holds, in which phase what is in memory, and the settings that make it fit.
Not responsible for: bytes (memory.py), seconds (time.py), words (report.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from dovetail.config.model import LoraConfig
from dovetail.config.run import ROWS_OF, RunConfig, StageName, stages_of
from dovetail.config.stages import PpoConfig, StageConfig
from dovetail.planning import memory, time, traffic
from dovetail.planning.architecture import Shape, shape_of
from dovetail.planning.memory import USABLE, Held, merged, needed_bytes, total
from dovetail.planning.result import Machine, Phase, Plan, Stage
from dovetail.planning.time import Generation, Learning, Parts

ROWS = 76256
"""The rows of rm-static, DeepSpeed-Chat's first data set."""


def plan_of(config: RunConfig, machine: Machine, *, rows: int = ROWS) -> Plan:
    """Plan all stages of a run. rows: of the whole data, which `data.stage_split` shares out.

    Raises ConfigError for a model whose shape is not known.
    """
    run = _Run(config, machine, rows)
    makers = {"sft": run.sft, "reward": run.reward, "ppo": run.ppo, "dpo": run.dpo}
    return Plan(
        actor=run.actor_shape,
        reward_model=run.reward_shape,
        machine=machine,
        stages=tuple(makers[name]() for name in stages_of(config.algorithm) if name in config.stages),
    )


class _Run:
    """The models of a run and the share that each process has of them."""

    def __init__(self, config: RunConfig, machine: Machine, rows: int) -> None:
        self.config, self.machine, self.rows = config, machine, rows
        self.actor_shape = shape_of(config.actor.path)
        self.reward_shape = shape_of(config.reward_start().path)
        self.tensor_size = config.tensor_parallel.training
        self.columns = max(1, machine.processes // self.tensor_size)
        """The processes that work on different sequences."""
        self.element_bytes = 4 if config.precision == "fp32" else 2

    def held(
        self, role: str, shape: Shape, lora: LoraConfig | None, *, is_scalar: bool, learns: bool, averaged: bool = False
    ) -> Held:  # fmt: skip
        """Return a model as each process holds it."""
        setting = {"reward model": "reward_model"}.get(role, role)
        num = shape.num_scalar_weights if is_scalar else shape.num_weights
        rank = lora.rank if lora is not None and learns else 0
        adapters = shape.num_adapter_weights(rank) + (shape.head_width if is_scalar and rank else 0)
        is_offloaded = bool(getattr(self.config.offload, setting))
        stage = getattr(self.config.zero_stage, setting) if self.columns > 1 or is_offloaded else 0
        of = shape.architecture
        split = self.tensor_size
        return Held(
            role=role,
            architecture=replace(
                of,
                vocabulary=0 if is_scalar else of.vocabulary,
                query_width=of.query_width // split,
                key_width=of.key_width // split,
                inner_width=of.inner_width // split,
            ),
            num_weights=(num + adapters) / split,
            num_trained=(adapters if rank else num) / split if learns else 0,
            rank=rank,
            element_bytes=self.element_bytes,
            stage=stage,
            shard_size=self.shard_size,
            is_offloaded=is_offloaded,
            is_averaged=averaged,
        )

    @property
    def shard_size(self) -> int:
        """The processes that shard one copy."""
        over = self.config.zero_stage.shard_over
        named = {"all": self.columns, "node": min(self.columns, self.machine.num_gpus)}
        return named[over] if isinstance(over, str) else min(over, self.columns)

    def stage_rows(self, stage: StageName) -> int:
        """Return the rows that a stage reads in one pass."""
        kinds = ("sft", "reward", "ppo")
        shares = self.config.data_of_stages().shares
        return int(self.rows * shares[kinds.index(ROWS_OF[stage])] / sum(shares))

    def sft(self) -> Stage:
        actor = self.held("actor", self.actor_shape, self.config.actor.lora, is_scalar=False, learns=True)
        return self._supervised("sft", self.config.sft, actor, self.actor_shape, answers=1)

    def reward(self) -> Stage:
        start = self.config.reward_start()
        critic = self.held("critic", self.reward_shape, start.lora, is_scalar=True, learns=True)
        return self._supervised("reward", self.config.reward, critic, self.reward_shape, answers=2)

    def dpo(self) -> Stage:
        actor = self.held("actor", self.actor_shape, self.config.actor.lora, is_scalar=False, learns=True)
        frozen = []
        if self.config.dpo.needs_reference and self.config.actor.lora is None:
            frozen = [self.held("reference", self.actor_shape, None, is_scalar=False, learns=False)]
        return self._supervised("dpo", self.config.dpo, actor, self.actor_shape, answers=2, frozen=frozen)

    def _supervised(
        self,
        name: Any,
        settings: Any,
        model: Held,
        shape: Shape,
        *,
        answers: int,
        frozen: Sequence[Held] = (),
    ) -> Stage:
        """Plan a stage that learns from data, all rows as long as they may be."""
        length = self.config.data.max_tokens
        cut = self._cut(settings, sequences=settings.batch_size * answers, length=length)
        is_checkpointed = self._checkpoints(settings, [model], frozen, cut)
        resident = merged([part for held in (model, *frozen) for part in (held.resident(), held.states())])
        step = model.training(cut.micro_tokens, cut.micro_batches, is_checkpointed=is_checkpointed)
        scored = 0 if model.architecture.vocabulary == 0 else cut.tokens
        seconds = self._learning(model, shape, cut, scored=scored, is_checkpointed=is_checkpointed)
        seconds |= time.scoring_parts(
            [self._pass(held, shape, cut, scored=scored) for held in frozen], self.machine.gpu
        )
        rows = round(self.stage_rows(name) * settings.epochs)
        steps = max(1, round(rows / settings.batch_size))
        return Stage(
            name=name,
            phases=(Phase(name="train", items=merged([resident, step]), seconds=seconds),),
            steps=min(steps, settings.max_steps or steps),
            rows=rows,
            tokens_per_step=settings.batch_size * answers * length,
            is_checkpointed=is_checkpointed,
            on_host=model.on_host(),
        )

    def ppo(self) -> Stage:
        """Plan rollouts and updates, all prompts and answers as long as they may be."""
        settings = self.config.ppo
        actor, critic, frozen = self._roles(settings)
        learning = [model for model in (actor, critic) if model is not None]
        prompt, new = self.config.data.max_prompt_tokens, settings.sampling.max_new_tokens
        cut = self._cut(settings, sequences=settings.batch_size // settings.minibatches, length=prompt + new)
        is_checkpointed = self._checkpoints(settings, learning, frozen, cut)
        kept = merged(part for held in (*learning, *frozen) for part in (held.resident(),))
        states = merged(part for held in learning for part in (held.states(),))
        idle = {} if settings.offload_while_generating else states
        generate, running = self._generate(actor, merged([kept, idle]), prompt, new)
        scored_by = [
            *frozen,
            *([critic] if critic else []),
            *([actor] if settings.needs_old_logprobs() else []),
        ]
        if self.config.actor.lora is not None:
            scored_by.append(replace(actor, role="reference"))
        phases = (generate, self._score(scored_by, merged([kept, idle]), cut), self._train(
            learning, merged([kept, states]), cut, is_checkpointed=is_checkpointed
        ))  # fmt: skip
        rows = self.stage_rows("ppo")
        steps = max(1, rows // settings.batch_size)
        return Stage(
            name="ppo",
            phases=phases,
            steps=settings.max_steps or steps,
            rows=rows,
            tokens_per_step=settings.batch_size * (prompt + new),
            is_checkpointed=is_checkpointed,
            running=running,
            on_host=merged(
                [
                    *(held.on_host() for held in learning),
                    *([states] if settings.offload_while_generating else []),
                ]
            ),
        )

    def _roles(self, settings: PpoConfig) -> tuple[Held, Held | None, list[Held]]:
        """Return actor, critic, and the frozen models."""
        lora = self.config.actor.lora
        actor = self.held("actor", self.actor_shape, lora, is_scalar=False, learns=True, averaged=True)
        frozen = []
        if lora is None:
            frozen.append(self.held("reference", self.actor_shape, None, is_scalar=False, learns=False))
        if not settings.reward_function or settings.reward_function_weight is not None:
            frozen.append(self.held("reward model", self.reward_shape, None, is_scalar=True, learns=False))
        start = self.config.reward_start()
        critic = None
        if self.config.algorithm == "ppo":
            critic = self.held("critic", self.reward_shape, start.lora, is_scalar=True, learns=True)
        return actor, critic, frozen

    def _generate(self, actor: Held, resident: dict[str, float], prompt: int, new: int) -> tuple[Phase, int]:
        """Plan generation, with as many answers at once as the memory that is left holds."""
        split = self._generation_split(actor, self.machine.gpu.usable_bytes - total(resident), new)
        of, eb = actor.architecture, actor.element_bytes
        whole = actor.weights * self.tensor_size / split
        gathered = {"actor weights, gathered": whole} if actor.is_gathered or split > 1 else {}
        answers = math.ceil(self.config.ppo.batch_size * split / self.machine.processes)
        reading = memory.prefill_bytes(of, tokens=answers * prompt, answers=answers, element_bytes=eb)
        free = self.machine.gpu.usable_bytes - total(resident, gathered)
        each = memory.cache_bytes(of, tokens=prompt + new, element_bytes=eb, split=split)
        fitting = max(1, int(memory.ARENA_SHARE * max(0.0, free) // each))
        running = min(memory.MAX_RUNNING, answers, fitting)
        items = merged([resident, gathered, {"KV cache": running * each, "workspace": reading}])
        seconds = time.generation_parts(
            self.actor_shape,
            self.machine.gpu,
            Generation(
                answers=answers,
                prompt=prompt,
                new_tokens=new,
                weights=(whole - self._unread() * eb / split),
                cache_per_token=each / (-(-(prompt + new) // memory.PAGE_TOKENS) * memory.PAGE_TOKENS),
                running=running,
                rank=actor.rank,
                split=split,
            ),
        )
        seconds |= self._switching(actor, split, running, new)
        return Phase(name="generate", items=items, seconds=seconds), running

    def _switching(self, actor: Held, split: int, running: int, new: int) -> Parts:
        """Return the seconds of gathering the actor to generate, and of what a divided one sends for each token."""
        layers, gpu = actor.architecture.num_layers, self.machine.gpu
        hidden = running * self.actor_shape.architecture.width * actor.element_bytes
        rounds = math.ceil(self.config.ppo.batch_size * split / self.machine.processes / running)
        each = traffic.sum_seconds(gpu, num_bytes=hidden, processes=split, layers=layers)
        parts = {"sums over the group": rounds * new * each}
        if actor.is_gathered:
            parts["gathering weights"] = self._ring(actor.weights, layers)
        return parts

    def _ring(self, num_bytes: float, collectives: int) -> float:
        """Return the seconds of collectives over the processes that shard one copy."""
        return traffic.ring_seconds(
            num_bytes,
            self.machine.gpu,
            gpus=self.shard_size,
            per_node=self.machine.num_gpus,
            collectives=collectives,
        )

    def _unread(self) -> float:
        """Return the weights that decoding does not read: an embedding beside an untied head."""
        return self.actor_shape.embedding if self.actor_shape.head else 0.0

    def _generation_split(self, actor: Held, free: float, new: int) -> int:
        """Return how many processes hold one copy to generate: as set, or on auto as few as a run would choose."""
        wanted = self.config.tensor_parallel.generation
        if wanted != "auto":
            return wanted
        sizes = [n for n in range(1, self.machine.processes + 1) if self.machine.processes % n == 0]
        if not actor.is_gathered:
            return 1
        page = memory.cache_bytes(
            actor.architecture, tokens=memory.PAGE_TOKENS, element_bytes=actor.element_bytes
        )
        token = page / memory.PAGE_TOKENS

        def needed(size: int) -> float:
            answers = min(
                memory.MAX_RUNNING, math.ceil(self.config.ppo.batch_size * size / self.machine.processes)
            )
            return (actor.weights * self.tensor_size + answers * new * token) / size

        return next((size for size in sizes if needed(size) <= USABLE * free), sizes[-1])

    def _score(self, models: Sequence[Held], resident: dict[str, float], cut: _Cut) -> Phase:
        adding = max((held.forward(cut.micro_tokens) for held in models), key=total)
        passes = []
        whole = replace(cut, tokens=cut.tokens * self.config.ppo.minibatches)
        for held in models:
            is_scalar = held.architecture.vocabulary == 0
            shape = self.reward_shape if is_scalar else self.actor_shape
            scored = 0.0 if is_scalar else whole.tokens * self._answer_share()
            passes.append(self._pass(held, shape, whole, scored=scored))
        seconds = time.scoring_parts(passes, self.machine.gpu)
        m = math.ceil(whole.tokens / whole.micro_tokens)
        sent = [
            (traffic.gathered(exchanged(held), m), held.architecture.num_layers)
            for held in models
            if held.stage
        ]
        waiting = sum(self._ring(size, layers * m) for size, layers in sent) - sum(seconds.values())
        seconds["waiting for weights"] = max(0.0, waiting)
        return Phase(name="score", items=merged([resident, adding]), seconds=seconds)

    def _answer_share(self) -> float:
        """Return the share of answers in the tokens of PPO: only their logits are computed."""
        new = self.config.ppo.sampling.max_new_tokens
        return new / (new + self.config.data.max_prompt_tokens)

    def _train(
        self, models: Sequence[Held], resident: dict[str, float], cut: _Cut, *, is_checkpointed: bool
    ) -> Phase:
        settings = self.config.ppo
        steps = settings.minibatches * settings.ppo_epochs
        adding = [
            held.training(cut.micro_tokens, cut.micro_batches, is_checkpointed=is_checkpointed)
            for held in models
        ]
        seconds: Parts = {}
        for held in models:
            is_scalar = held.architecture.vocabulary == 0
            shape = self.reward_shape if is_scalar else self.actor_shape
            scored = 0.0 if is_scalar else cut.tokens * self._answer_share()
            found = self._learning(held, shape, cut, scored=scored, is_checkpointed=is_checkpointed)
            seconds |= {name: steps * value for name, value in found.items()}
        return Phase(name="train", items=merged([resident, max(adding, key=total)]), seconds=seconds)

    def _learning(
        self, held: Held, shape: Shape, cut: _Cut, *, scored: float, is_checkpointed: bool
    ) -> Parts:  # fmt: skip
        step = Learning(
            tokens=cut.tokens / self.tensor_size,
            length=cut.length,
            scored=scored / self.tensor_size,
            micro_batches=cut.micro_batches,
            rank=held.rank,
            is_checkpointed=is_checkpointed,
            num_trained=held.num_trained / held.num_shards,
            is_averaged=held.is_averaged,
            is_offloaded=held.is_offloaded,
            weights=held.weights / held.num_shards,
        )
        parts = time.training_parts(shape, self.machine.gpu, step, role=held.role)
        return parts | {
            f"{held.role} waiting for other processes": self._waiting(held, cut, sum(parts.values()))
        }

    def _waiting(self, held: Held, cut: _Cut, computing: float) -> float:
        """Return the seconds of a gradient step's collectives that computing does not hide; replicas sum at its end."""
        layers = held.architecture.num_layers
        size = traffic.stepped(exchanged(held), cut.micro_batches)
        if held.stage == 0:
            return traffic.ring_seconds(
                size,
                self.machine.gpu,
                gpus=self.columns,
                per_node=self.machine.num_gpus,
                collectives=2 * layers,
            )
        passes = 3 * cut.micro_batches if held.stage == 3 else 2
        return max(0.0, self._ring(size, passes * layers) - computing)

    def _pass(self, held: Held, shape: Shape, cut: _Cut, *, scored: float) -> time.Pass:
        return time.Pass(
            role=held.role,
            shape=shape,
            tokens=cut.tokens / self.tensor_size,
            length=cut.length,
            scored=scored / self.tensor_size,
            micro_batches=math.ceil(cut.tokens / cut.micro_tokens),
        )

    def _cut(self, settings: StageConfig, *, sequences: int, length: int) -> _Cut:
        """Return the micro-batches of one process."""
        own = math.ceil(sequences / self.columns)
        each = max(1, min(own, settings.micro_batch_tokens // length))
        return _Cut(
            tokens=own * length,
            length=length,
            micro_tokens=each * length,
            micro_batches=math.ceil(own / each),
        )

    def _checkpoints(
        self, settings: StageConfig, learning: Sequence[Held], frozen: Sequence[Held], cut: _Cut
    ) -> bool:
        """Return whether activations are recomputed: as the settings say, or as a run decides on auto."""
        if settings.activation_checkpointing != "auto":
            return settings.activation_checkpointing
        free = self.machine.gpu.usable_bytes - total(*(held.resident() for held in (*learning, *frozen)))
        needed = needed_bytes(learning, tokens=settings.micro_batch_tokens)
        return needed > USABLE * free


def exchanged(held: Held) -> traffic.Exchanged:
    """Return a model as far as processes exchange it."""
    return traffic.Exchanged(held.weights, memory.GRADIENT * held.num_trained, held.stage)


@dataclass(frozen=True, slots=True)
class _Cut:
    """The tokens of one gradient step in a process, and its micro-batches."""

    tokens: float
    length: int
    micro_tokens: int
    micro_batches: int
