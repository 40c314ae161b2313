"""One process of a group that steps along as a stage does; the ranks that are named sleep in each step.

RANK=0 WORLD_SIZE=3 ... python -m tests.training.straggling STEPS SLEEPER...
"""

import sys
import time

import torch

from dovetail.parallel.world import joined
from dovetail.stages.stopping import stop_request
from dovetail.training import stragglers as module

STEP_S = 0.2


def main(steps: str, *sleepers: str) -> None:
    module.AT_LEAST_S = STEP_S / 2
    with joined(torch.device("cpu")) as world, stop_request(world) as stop:
        stop.stragglers.begin()
        for _ in range(int(steps)):
            if str(world.rank) in sleepers:
                time.sleep(STEP_S)
            world.sum(torch.ones(1))
            stop.asked()
        sys.stdout.write(f"figures {sorted(stop.stragglers.figures.items())}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
