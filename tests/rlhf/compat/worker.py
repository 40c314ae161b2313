"""One process of a group, with its share of the prompts: trains by the predecessor's names, and keeps what came out.

RANK=0 WORLD_SIZE=2 ... python -m tests.rlhf.compat.worker FOLDER KIND; KIND: a name in CASES, or `apart` to join
nobody.
"""

import sys
from pathlib import Path
from typing import Any

import torch

from dovetail.rlhf.compat.deepspeed_chat import (
    DeepSpeedPPOTrainerUnsupervised,
    convert_lora_to_linear_layer,
    init_distributed,
    moving_average,
)
from tests.rlhf.compat.tiny import arguments, prompt_batch, tiny
from tests.rlhf.tiny import PROMPTS

CASES: dict[str, dict[str, Any]] = {
    "replicas": {"actor_zero_stage": 0, "critic_zero_stage": 0},
    "shards": {"actor_zero_stage": 3, "critic_zero_stage": 2, "gradient_accumulation_steps": 2},
    "adapters": {"actor_zero_stage": 2, "critic_zero_stage": 3, "actor_lora_dim": 4, "critic_lora_dim": 4},
}


def train(kind: str, rank: int, size: int) -> dict[str, Any]:
    """Two rollouts, two passes over each; what this process was given, and in the first what was trained."""
    args = arguments(**CASES.get(kind, {}))
    engine = tiny(args)
    trainer = DeepSpeedPPOTrainerUnsupervised(engine, args)
    share = len(PROMPTS) // size
    mine = slice(rank * share, (rank + 1) * share)
    batch = {name: rows[mine] for name, rows in prompt_batch(engine).items()}
    ids = torch.randint(0, 250, (len(PROMPTS), 20), generator=torch.Generator().manual_seed(0))[mine]
    found: dict[str, Any] = {"losses": [], "rewards": [], "advantages": []}
    for step in range(2):
        out = trainer.generate_experience(batch["prompt"], batch["prompt_att_mask"], step)
        found["rewards"].append(out["rewards"])
        found["advantages"].append(out["advantages"])
        for _ in range(2):
            losses = trainer.train_rlhf(out)
            text = trainer.train_unsupervised({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, 0.5)
            found["losses"].append([loss.item() for loss in (*losses, text)])
            moving_average(engine.actor, engine.actor_ema)
    for name in ("actor", "critic", "actor_ema"):
        finished = convert_lora_to_linear_layer(getattr(engine, name))
        if rank == 0:
            found[name] = {key: weight.clone() for key, weight in finished.state_dict().items()}
    return found


def main(folder: str, kind: str) -> None:
    """Join the others, train, and leave `KIND-RANK.pt`."""
    torch.set_num_threads(1)
    if kind != "apart":
        init_distributed()
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    torch.save(train(kind, rank, size), Path(folder) / f"{kind}-{rank}.pt")


if __name__ == "__main__":
    if sys.argv[2] == "apart":
        tiny(arguments())
    main(*sys.argv[1:])
