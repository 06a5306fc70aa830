"""Torchrun, with word of how its ranks ended.

    python -m posttrain_workloads.ranks <launch's process id> <torchrun's arguments>

It owns that torchrun ends with launch and that the exit code or signal of each rank reaches the runtime folder, which
torchrun itself only prints; it must not add or change anything in torchrun's own arguments and environment.
"""

from __future__ import annotations

import os
import sys

from posttrain_workloads.runtime import Runtime, die_with_parent


def main() -> None:
    """Run torchrun; write `exits.json` if a rank failed."""
    die_with_parent(int(sys.argv[1]))

    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    try:
        torchrun(sys.argv[2:])
    except ChildFailedError as error:
        exits = {rank: (failure.exitcode, float(failure.timestamp)) for rank, failure in error.failures.items()}
        Runtime.of(os.environ).write_exits(exits)
        sys.exit(1)


if __name__ == "__main__":
    main()
