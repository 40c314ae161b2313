"""One whole run: models, data, the three stages, and where the results go.

Responsible for: the root of the configuration. Not responsible for: YAML and overrides (config/load.py).
"""

from os.path import expanduser
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, NonNegativeInt, PositiveInt, model_validator

from dovetail.config.data import DataConfig
from dovetail.config.frozen import FrozenModel
from dovetail.config.model import ModelConfig, Precision
from dovetail.config.policy import METHODS, PolicyConfig
from dovetail.config.sharding import OffloadConfig, TensorParallelConfig, ZeroStageConfig
from dovetail.config.stages import DpoConfig, PpoConfig, RewardConfig, SftConfig

StageName = Literal["sft", "reward", "ppo", "dpo"]
RowKind = Literal["sft", "reward", "ppo"]
ROW_KINDS: tuple[RowKind, ...] = ("sft", "reward", "ppo")
"""The kinds of rows in the order of `data.stage_split`."""

ROWS_OF: dict[StageName, RowKind] = {"sft": "sft", "reward": "reward", "ppo": "ppo", "dpo": "reward"}
"""The kind of rows that each stage reads, named after the stage of PPO that reads it."""


def stages_of(algorithm: str) -> tuple[StageName, ...]:
    """Return the stages of an algorithm, in order."""
    return ("sft", "dpo") if algorithm == "dpo" else ("sft", "reward", "ppo")


def _known_algorithm(name: str) -> str:
    known = ("ppo", "dpo", *METHODS)
    if name not in known and ".py:" not in name:
        raise ValueError(
            f"{name!r} is not an algorithm; write one of {', '.join(known)}, or path/to/file.py:Class"
        )
    return name


class TrackingConfig(FrozenModel):
    """The trackers that get metrics beside `metrics.jsonl`."""

    advanced: ClassVar[frozenset[str]] = frozenset({"print_every"})

    tensorboard: bool = True
    """Write TensorBoard event files to `RUN/tensorboard`."""
    wandb_project: str | None = None
    """Also send metrics to this Weights & Biases project (needs `pip install wandb`)."""
    print_every: PositiveInt = 10
    """Steps between printed lines when the output is not a terminal."""


class RunConfig(FrozenModel):
    """Everything that decides a run's result."""

    actor: ModelConfig
    """The model to be trained into an assistant."""
    reward_model: ModelConfig | None = None
    """The start of the reward model: a causal LM, or a finished reward model. Default: the actor's model."""
    data: DataConfig = DataConfig()
    """Sources, split and limits."""
    sft: SftConfig = SftConfig()
    """Stage 1."""
    reward: RewardConfig = RewardConfig()
    """Stage 2."""
    ppo: PpoConfig = PpoConfig()
    """Stage 3."""
    dpo: DpoConfig = DpoConfig()
    """The stage after SFT with `algorithm: dpo`."""
    policy: PolicyConfig = PolicyConfig()
    """The settings of a method without a critic, beside those of `ppo`."""
    algorithm: Annotated[str, AfterValidator(_known_algorithm)] = "ppo"
    """The way to a better actor. ppo: a reward model, then PPO. dpo: from comparisons directly, in one stage after SFT.
    Without a critic, in place of PPO: grpo, dr_grpo, dapo, gspo, cispo, rloo, reinforce_plus_plus,
    reinforce_plus_plus_baseline, best_of_n, expert_iteration, online_dpo, or your own as `file.py:Class`
    (docs/algorithms.md)."""
    stages: Annotated[tuple[StageName, ...], Field(min_length=1)] = ("sft", "reward", "ppo")
    """The stages that run; with `algorithm: dpo` by default sft and dpo. One that is left out must have finished before
    in the same output folder, or is replaced by the pretrained model itself."""
    output_dir: Annotated[str, AfterValidator(expanduser)]
    """Folder of the run: resolved config, metrics, checkpoints, final models."""
    seed: NonNegativeInt = 0
    """Seed of everything random: initial heads, order, sampling."""
    precision: Precision = "auto"
    """bf16 where the device computes in it, fp16 with loss scaling on older cards, else fp32."""
    device: str = "auto"
    """cuda, cpu, or auto = the first GPU if there is one."""
    zero_stage: ZeroStageConfig = ZeroStageConfig()
    """The ZeRO stage of each model, where several processes train it."""
    tensor_parallel: TensorParallelConfig = TensorParallelConfig()
    """The number of processes that compute each layer together."""
    offload: OffloadConfig = OffloadConfig()
    """The sharded models that live in host memory."""
    num_gpus: PositiveInt = 1
    """Processes that `dovetail train` starts on each machine, one per GPU. With a hostfile 1 means its slots."""
    tracking: TrackingConfig = TrackingConfig()
    """The trackers that get the metrics."""

    @model_validator(mode="before")
    @classmethod
    def _all_stages_of_the_algorithm(cls, values: Any) -> Any:
        if isinstance(values, dict) and "stages" not in values:
            return values | {"stages": stages_of(values.get("algorithm", "ppo"))}
        return values

    @model_validator(mode="after")
    def _stages_belong_to_the_algorithm(self) -> Self:
        own = stages_of(self.algorithm)
        for stage in self.stages:
            if stage not in own:
                raise ValueError(
                    f"stages = [{', '.join(self.stages)}], but algorithm = {self.algorithm} has no stage {stage}; set "
                    f"stages to some of {', '.join(own)}, or another algorithm"
                )
        return self

    @model_validator(mode="after")
    def _policy_has_what_the_algorithm_takes(self) -> Self:
        if ":" in self.algorithm:
            return self
        for name in sorted(self.policy.model_dump(exclude_none=True)):
            if name not in METHODS.get(self.algorithm, {}):
                those = [method for method, settings in METHODS.items() if name in settings]
                raise ValueError(
                    f"policy.{name} is set, but algorithm = {self.algorithm} does not take it; remove it, or set "
                    f"algorithm to one of {', '.join(those)}"
                )
        return self

    @model_validator(mode="after")
    def _what_is_offloaded_is_sharded(self) -> Self:
        for name in self.offload.models:
            if getattr(self.zero_stage, name) == 0:
                raise ValueError(
                    f"offload.{name} = true, but zero_stage.{name} = 0: only sharded weights can stay in host memory; "
                    f"set zero_stage.{name}=3, which brings them to the device layer by layer"
                )
        return self

    def data_of_stages(self) -> DataConfig:
        """Return the data settings in which rows that the algorithm does not read get no share of `stage_split`.

        A stage that runs alone takes all rows, unless a split is asked for.
        """
        is_alone = len(self.stages) == 1 and self.data.stage_split is None
        read = {ROWS_OF[stage] for stage in (self.stages if is_alone else stages_of(self.algorithm))}
        if len(read) == len(ROW_KINDS):
            return self.data
        shares = tuple(
            (1.0 if is_alone else share) if kind in read else 0.0
            for kind, share in zip(ROW_KINDS, self.data.shares, strict=True)
        )
        return self.data.model_copy(update={"stage_split": shares})

    def reward_start(self) -> ModelConfig:
        """Return the model that stage 2 starts from when it does not start from the SFT model."""
        return self.reward_model or self.actor
