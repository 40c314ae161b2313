"""The settings with which the stages train.

Responsible for: the settings of supervised fine-tuning, reward model, PPO and direct preference optimisation.
Not responsible for: the loops.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AliasChoices,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from dovetail.config.frozen import FrozenModel

Fraction = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(FrozenModel):
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) with float32 master weights, and its schedule."""

    advanced: ClassVar[frozenset[str]] = frozenset(
        {"schedule", "final_fraction", "weight_decay", "betas", "eps", "max_grad_norm"}
    )

    learning_rate: NonNegativeFloat = 1e-5
    """Peak learning rate. Full weights: about 1e-5; LoRA adapters: 1e-4 to 5e-4."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the decay after warm-up, per optimiser step."""
    warmup_steps: NonNegativeInt = 0
    """Optimiser steps over which the rate rises linearly from 0."""
    final_fraction: Fraction = 0.0
    """The rate at the end of the decay, as a fraction of the peak."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled decay per step, times the rate. Norms, biases and the scalar head are exempt."""
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    """Adam's moment decay rates (InstructGPT, appendix C: 0.9, 0.95)."""
    eps: PositiveFloat = 1e-8
    """Adam's epsilon; OpenAI's RLHF code uses 1e-5 in PPO."""
    max_grad_norm: PositiveFloat = 1.0
    """The gradient of the whole batch is scaled down to this norm, per model."""


class StageConfig(FrozenModel):
    """The settings that all stages share."""

    advanced: ClassVar[frozenset[str]] = frozenset(
        {"activation_checkpointing", "save_every", "keep_checkpoints"}
    )

    batch_size: PositiveInt = 32
    """Sequences (SFT), prompts (reward model) or answers (PPO) per optimiser step or rollout."""
    micro_batch_tokens: PositiveInt = 8192
    """Tokens of one forward and backward pass. Halved, and said so, when a step runs out of memory. The
    result does not depend on it: losses are normalised over the whole batch."""
    activation_checkpointing: Literal["auto"] | bool = "auto"
    """Recompute activations in the backward pass: less memory, about a third slower. auto: if by an estimate a
    step would not fit on the device otherwise, which is then said; off on the CPU."""
    eval_every: PositiveInt = 50
    """Optimiser steps (SFT, reward model) or rollouts (PPO) between evaluations on held-out rows."""
    save_every: PositiveInt = 100
    """Steps or rollouts between checkpoints; the end of a stage is always saved."""
    keep_checkpoints: PositiveInt = 2
    """The number of newest checkpoints that stay on disk beside the best one: that of least held-out loss, in PPO of
    the highest held-out objective (as `ppo/best`), among those saved right after an evaluation."""
    max_steps: PositiveInt | None = None
    """Stop after this many optimiser steps (SFT, reward model) or rollouts (PPO). By default `epochs`
    decides; in PPO, one pass over the prompts."""


class SftConfig(StageConfig):
    """Stage 1: supervised fine-tuning on demonstrations (InstructGPT, section 3.5)."""

    epochs: PositiveFloat = 1.0
    """Passes over the demonstrations; the predecessor's sixteen over-fit from the second on."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Optimiser and schedule."""


class RewardConfig(StageConfig):
    """Stage 2: the reward model on ranked answers (InstructGPT, equation 1)."""

    advanced: ClassVar[frozenset[str]] = StageConfig.advanced | {"start_from"}

    epochs: PositiveFloat = 1.0
    """Passes over the comparisons; more than one over-fits (InstructGPT, appendix C.2)."""
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=2e-5)
    """Optimiser and schedule."""
    start_from: Literal["model", "sft"] = "model"
    """Begin at `reward_model.path`, or at the finished SFT model of this run."""


PreferenceLoss = Literal["sigmoid", "ipo", "simpo", "kto", "orpo"]
_BETAS: dict[PreferenceLoss, float] = {"sigmoid": 0.1, "ipo": 0.1, "simpo": 2.0, "kto": 0.1, "orpo": 0.1}


class DpoConfig(StageConfig):
    """Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290): the actor learns from comparisons."""

    advanced: ClassVar[frozenset[str]] = StageConfig.advanced | {"label_smoothing", "simpo_gamma"}

    batch_size: PositiveInt = 64
    """Prompts per optimiser step, each with all its answers (the DPO paper's 64 pairs)."""
    loss: PreferenceLoss = "sigmoid"
    """The loss of a pair. sigmoid: DPO; ipo: Azar et al. 2023 (arXiv:2310.12036); kto: Ethayarajh et al. 2024
    (arXiv:2402.01306), the answers of a pair as a desirable and an undesirable one. Two need no reference model:
    simpo (Meng et al. 2024, arXiv:2405.14734) and orpo (Hong et al. 2024, arXiv:2403.07691), which imitates the better
    answer as well."""
    beta: PositiveFloat | None = None
    """The strength of the pull towards the reference (sigmoid, kto), IPO's tau, SimPO's scale of rewards, or ORPO's
    weight of the odds ratio. null = what papers and TRL use: 2.0 for simpo, else 0.1."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """The share of pairs thought to be labelled the wrong way round (conservative DPO); with loss = sigmoid alone."""
    simpo_gamma: NonNegativeFloat = 1.0
    """SimPO's target margin, half of its beta as the paper advises; with loss = simpo alone."""
    epochs: PositiveFloat = 1.0
    """Passes over the comparisons."""
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-6, warmup_steps=10)
    """Optimiser and schedule. The peak rate is that of the DPO paper and TRL for full weights; adapters need about ten
    times as much."""

    @property
    def beta_in_force(self) -> float:
        """Return `beta`, or the default of the loss."""
        return _BETAS[self.loss] if self.beta is None else self.beta

    @property
    def needs_reference(self) -> bool:
        """Return whether the loss compares the actor with the model that it starts from."""
        return self.loss not in ("simpo", "orpo")

    @model_validator(mode="after")
    def _smoothing_has_a_meaning(self) -> "DpoConfig":
        if self.label_smoothing and self.loss != "sigmoid":
            raise ValueError(
                f"label_smoothing = {self.label_smoothing:g} with loss = {self.loss}: only the loss sigmoid has it; "
                "set label_smoothing to 0, or loss to sigmoid"
            )
        return self


class SamplingConfig(FrozenModel):
    """The sampling of answers in PPO. The same temperature divides the logits in every log-probability."""

    temperature: PositiveFloat = 1.0
    """Divides the logits, in sampling and in training alike."""
    max_new_tokens: PositiveInt = 256
    """An answer that has not ended by then is cut off; `cut_off_answers` says how it counts."""


class RewardTerm(FrozenModel):
    """One of several reward functions."""

    advanced: ClassVar[frozenset[str]] = frozenset({"time_limit", "fallback"})

    function: str
    """`package.module:function`, `file.py:function` or a built-in verifier: code, exact, json_schema, maths, number or
    regex."""
    weight: float = Field(default=1.0, allow_inf_nan=False)
    """The factor of its scores in the sum; below 0 for what is to be avoided."""
    time_limit: PositiveFloat = 300.0
    """Seconds that one call of the function may take; it is tried three times."""
    fallback: float | None = Field(default=None, allow_inf_nan=False)
    """The score of an answer that the function fails on; null = the lowest score of the batch."""

    @model_validator(mode="before")
    @classmethod
    def _from_short_string(cls, value: Any) -> Any:
        return {"function": value} if isinstance(value, str) else value


class EnvironmentConfig(FrozenModel):
    """An environment, with which each answer becomes an episode of several turns."""

    advanced: ClassVar[frozenset[str]] = frozenset({"max_turns", "time_limit", "fallback"})

    source: str
    """`package.module:name` or `file.py:name` of a class with `reset` and `step`, or of a list of functions that the
    model may call as tools."""
    max_turns: PositiveInt = 8
    """The model's turns in one episode. An episode that has not ended by then is cut off, as one that reached
    `sampling.max_new_tokens`, which counts the tokens of all turns and replies."""
    time_limit: PositiveFloat = 60.0
    """Seconds that one call of the environment may take."""
    fallback: float | None = Field(default=None, allow_inf_nan=False)
    """The score of an episode whose environment fails; null = the lowest score of the batch."""

    @model_validator(mode="before")
    @classmethod
    def _from_short_string(cls, value: Any) -> Any:
        return {"source": value} if isinstance(value, str) else value


class PpoConfig(StageConfig):
    """Stage 3: PPO (Schulman et al. 2017, arXiv:1707.06347) as in InstructGPT, section 3.5 and appendix C."""

    advanced: ClassVar[frozenset[str]] = StageConfig.advanced | {
        "critic_warmup_rollouts", "critic_warmup_learning_rate", "curriculum_score",
        "kl_target", "kl_limit", "kl_stop", "approx_kl_stop", "ratio_clip", "dual_clip", "cut_off_answers",
        "value_clip", "old_logprobs", "importance_cap", "gamma", "gae_lambda", "score_clip", "standardise_scores",
        "missing_end_penalty",
        "whiten_rewards", "ema_decay", "offload_while_generating", "ptx_batch_size", "reward_function_weight",
        "print_samples_every", "eval_tasks",
    }  # fmt: skip

    batch_size: PositiveInt = 64
    """Answers per rollout."""
    minibatches: PositiveInt = 1
    """Optimiser steps per epoch over one rollout."""
    ppo_epochs: PositiveInt = 1
    """Passes over each rollout."""
    curriculum_score: float | None = Field(default=None, allow_inf_nan=False)
    """An answer with at least this score passes, and prompts whose answers so far nearly all pass, or nearly none, are
    asked less often, down to a tenth. null = all prompts alike."""
    sampling: SamplingConfig = SamplingConfig()
    """The sampling of answers."""
    actor_optimizer: OptimizerConfig = OptimizerConfig(learning_rate=9.65e-6, warmup_steps=10, eps=1e-5)
    """Actor's optimiser; warm-up counts optimiser steps."""
    critic_optimizer: OptimizerConfig = OptimizerConfig(learning_rate=3e-5, warmup_steps=10, eps=1e-5)
    """Critic's optimiser. Its rate is about three times the actor's: the reward model was trained at the last token
    alone, so the critic must learn values everywhere else, and it must follow the actor as it moves."""
    critic_warmup_rollouts: NonNegativeInt = 20
    """The most rollouts in which the critic learns alone, and never more than a tenth of the run. The actor starts as
    soon as the critic explains a fifth of the variance of the rewards to come; 0 = at once."""
    critic_warmup_learning_rate: PositiveFloat | None = None
    """Learning rate of the critic while it learns alone; null = three times the peak rate of `critic_optimizer`."""
    kl_coefficient: NonNegativeFloat = 0.05
    """Weight of the per-token penalty log p_actor - log p_reference in the reward (beta; InstructGPT:
    0.02)."""
    kl_target: PositiveFloat | None = None
    """Nats per answer: after each rollout `kl_coefficient` moves by up to 2 % towards what keeps the KL there (Ziegler
    et al. 2019, arXiv:1909.08593, section 2.2, with their gain of 0.1)."""
    kl_limit: PositiveFloat = 20.0
    """Nats per answer: `ppo/best` is the model with the highest held-out objective among those below this."""
    kl_stop: PositiveFloat | None = 50.0
    """Nats per answer above which the run stops with a diagnosis."""
    approx_kl_stop: PositiveFloat | None = None
    """Nats per token: the first optimiser step that finds the actor farther than this from where the rollout's update
    began is the last on that rollout, in all processes; for several epochs or minibatches. null = take all steps."""
    ratio_clip: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """PPO epsilon: the probability ratio is clipped to [1 - ratio_clip, 1 + ratio_clip]."""
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    """The ratio counts as at most this where the advantage is negative (Ye et al. 2020, arXiv:1912.09729, who take 3);
    with several epochs or minibatches. null = without bound."""
    value_clip: PositiveFloat | None = 0.2
    """The new value is clipped to within this of the old one in the value loss; null = no clipping."""
    old_logprobs: Literal["auto", "training", "generation"] = "auto"
    """The source of the actor's log-probabilities before the update. training: a forward pass of its own over
    each rollout. generation: the KL penalty takes the generator's, and the ratio's denominator is the update's
    own forward, so that no extra pass is needed; only with one epoch and one minibatch. auto: generation where
    that is possible."""
    importance_cap: PositiveFloat | None = 2.0
    """Each advantage is weighted by p_training / p_generator of its token, at most this (truncated importance
    sampling); null = no weight."""
    gamma: Fraction = 1.0
    """Discount per token."""
    gae_lambda: Fraction = 0.95
    """GAE lambda (Schulman et al. 2016, arXiv:1506.02438)."""
    score_clip: PositiveFloat | None = 5.0
    """Scores of a reward model are clipped to [-score_clip, score_clip] before anything is added to them; null = no
    clipping. A reward function's scores are never clipped."""
    standardise_scores: bool = False
    """Subtract from every score the mean of the scores of the actor's answers before training, and divide by their
    standard deviation, before anything is clipped. They are measured once, on up to 256 prompts. `curriculum_score`
    and `policy.min_reward` are then compared with scores on this scale."""
    cut_off_answers: Literal["penalise", "keep_score", "leave_out"] = "penalise"
    """The rule for an answer that reached `sampling.max_new_tokens`. penalise: with `missing_end_penalty` as its score.
    keep_score: with its own score, as DeepSpeed-Chat does. leave_out: not at all; neither actor nor critic learns from
    it."""
    missing_end_penalty: float | None = None
    """Score of an answer that was cut off, where `cut_off_answers` is penalise; null = 1 below the lowest score of the
    rollout."""
    whiten_rewards: bool = False
    """Divide per-token rewards by their standard deviation over the batch, keeping the mean, before GAE."""
    ema_decay: Fraction = 0.992
    """Decay per optimiser step of the float32 average of the actor (`ppo/model_ema`)."""
    offload_while_generating: Annotated[
        bool, Field(validation_alias=AliasChoices("offload_while_generating", "park_optimizer"))
    ] = False
    """Keep optimiser states and the moving average in host memory while answers are generated and scored: room
    for longer answers on the device, for two copies over the bus per rollout. Nothing to do on the CPU."""
    ptx_coefficient: NonNegativeFloat = 0.1
    """Mixture training (PPO-ptx): weight of the loss per token of plain text beside the PPO loss per token, in
    the same optimiser step. Takes effect where `data.pretraining` lists text, and nowhere else; 0 turns it
    off. The paper's 27.8 is for its own normalisation."""
    ptx_batch_size: PositiveInt = 16
    """Texts of mixture training per optimiser step."""
    reward_function: tuple[RewardTerm, ...] = ()
    """The function that scores answers instead of the reward model, or a list of several whose weighted scores are
    summed. A text stands for a function with weight 1: `package.module:function`, `file.py:function` or a verifier."""
    environment: EnvironmentConfig | None = None
    """The environment that answers the model's turns, or tools that it may call. A text stands for its `source`. Its
    rewards are added to the scores of `reward_function`, and replace the reward model's if there are none."""
    reward_function_weight: PositiveFloat | None = None
    """Add the score of `reward_function`, times this, to the reward model's, instead of replacing it."""
    print_samples_every: PositiveInt = 10
    """Rollouts between printed sample answers, which are also kept in `ppo/samples.jsonl`."""
    eval_tasks: tuple[str, ...] = ()
    """Tasks of `dovetail eval` for the actor at each evaluation, such as [squad=dev.jsonl, number=sums.jsonl,
    text=wiki.jsonl]; their figures are recorded as `ppo/squad_dev_f1` and the like."""

    def needs_old_logprobs(self) -> bool:
        """Return whether the actor scores each rollout in a training forward of its own before the update."""
        return self.old_logprobs == "training" or self._several_steps()

    def _several_steps(self) -> bool:
        return self.ppo_epochs * self.minibatches > 1

    @field_validator("reward_function", mode="before")
    @classmethod
    def _one_reward_function(cls, value: Any) -> Any:
        """Return a list of functions: a text is one, and null is none."""
        return [value] if isinstance(value, str) else value or []

    @model_validator(mode="after")
    def _one_step_on_generated_logprobs(self) -> "PpoConfig":
        if self.old_logprobs == "generation" and self._several_steps():
            raise ValueError(
                f"old_logprobs = generation with ppo_epochs = {self.ppo_epochs} and minibatches = "
                f"{self.minibatches}: after the first step the update's own forward is of another policy; set "
                "old_logprobs to auto or training, or both numbers to 1"
            )
        return self

    @model_validator(mode="after")
    def _minibatches_divide(self) -> "PpoConfig":
        if self.batch_size % self.minibatches:
            raise ValueError(
                f"batch_size = {self.batch_size} is not divisible by minibatches = {self.minibatches}; "
                f"set batch_size to {-(-self.batch_size // self.minibatches) * self.minibatches}"
            )
        return self
