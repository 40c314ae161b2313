"""One process of a group that fails as the argument says: `one` process, or `all` with the same error."""

import sys

import torch

from dovetail.errors import DataError, DovetailError
from dovetail.parallel.world import joined


def main(who: str) -> int:
    """As the command line does: an error's message on the screen, status 2."""
    try:
        with joined(torch.device("cpu")) as world:
            if who == "all" or world.rank == 1:
                raise DataError("row 7 has no text")
            world.wait()
    except DovetailError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
