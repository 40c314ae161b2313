"""The one-line script: python train.py --actor-model facebook/opt-1.3b --reward-model facebook/opt-350m
--num-gpus 1

Responsible for: nothing but the name; `dovetail train` reads the flags and does the work.
"""

import sys

from dovetail.cli.main import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
