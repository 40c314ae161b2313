"""DeepSpeed-Chat's names over our engine: its step-3 script runs with only the import lines changed.

Responsible for: being the one module that replaces a script's imports from `deepspeed` and `dschat`.
Not responsible for: the names themselves, which the rest of this package defines; docs/from-deepspeed-chat.md says what
becomes of every flag.
"""

from dovetail.rlhf.compat.flags import config_from, setup_from
from dovetail.rlhf.compat.models import (
    DeepSpeedRLHFEngine,
    convert_lora_to_linear_layer,
    moving_average,
    save_hf_format,
    save_zero_three_model,
)
from dovetail.rlhf.compat.processes import (
    add_config_arguments,
    get_accelerator,
    get_all_reduce_mean,
    init_distributed,
    is_rank_0,
)
from dovetail.rlhf.compat.prompts import DataCollatorRLHF, create_prompt_dataset, get_unsupervised_data
from dovetail.rlhf.compat.script import (
    ExponentialMovingAverage,
    MiniDataset,
    load_hf_tokenizer,
    print_rank_0,
    print_throughput_step3,
    set_random_seed,
    to_device,
)
from dovetail.rlhf.compat.trainer import DeepSpeedPPOTrainer, DeepSpeedPPOTrainerUnsupervised

__all__ = [
    "DataCollatorRLHF",
    "DeepSpeedPPOTrainer",
    "DeepSpeedPPOTrainerUnsupervised",
    "DeepSpeedRLHFEngine",
    "ExponentialMovingAverage",
    "MiniDataset",
    "add_config_arguments",
    "config_from",
    "convert_lora_to_linear_layer",
    "create_prompt_dataset",
    "get_accelerator",
    "get_all_reduce_mean",
    "get_unsupervised_data",
    "init_distributed",
    "is_rank_0",
    "load_hf_tokenizer",
    "moving_average",
    "print_rank_0",
    "print_throughput_step3",
    "save_hf_format",
    "save_zero_three_model",
    "set_random_seed",
    "setup_from",
    "to_device",
]
