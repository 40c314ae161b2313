"""One whole run: models, data, the three stages, and where the results go.

Responsible for: the root of the configuration. Not responsible for: YAML and overrides (config/load.py).
"""

from os.path import expanduser
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, NonNegativeInt, PositiveInt, model_validator

from dovetail.config.data import DataConfig
from dovetail.config.frozen import FrozenModel
from dovetail.config.model import ModelConfig, Precision
from dovetail.config.sharding import OffloadConfig, TensorParallelConfig, ZeroStageConfig
from dovetail.config.stages import PpoConfig, RewardConfig, SftConfig

StageName = Literal["sft", "reward", "ppo"]


class TrackingConfig(FrozenModel):
    """The trackers that get metrics beside `metrics.jsonl`."""

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
    stages: Annotated[tuple[StageName, ...], Field(min_length=1)] = ("sft", "reward", "ppo")
    """The stages that run. One that is left out must have finished before in the same output folder, or is
    replaced by the pretrained model itself."""
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
        """Return the data settings in which a stage that runs alone takes all rows, unless a split is asked for."""
        if len(self.stages) > 1 or self.data.stage_split is not None:
            return self.data
        shares = tuple(float(stage in self.stages) for stage in ("sft", "reward", "ppo"))
        return self.data.model_copy(update={"stage_split": shares})

    def reward_start(self) -> ModelConfig:
        """Return the model that stage 2 starts from when it does not start from the SFT model."""
        return self.reward_model or self.actor
