"""Execute a run in a process that may open nothing in the run's storage: `python run_without_storage.py FILE STATE`.

The processes it starts are not held by that: an audit hook is of one process.
"""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from posttrain.api.training_run import TrainingRun
from posttrain.local.environments import cache_root
from posttrain.local.runner import run_file
from posttrain.local.state import RunFolder
from posttrain.plan.types import Event


class Silent:
    """A view that shows nothing, and so needs no report, which is made from the storage."""

    def stage(self, text: str) -> None:
        pass

    def update(self, run: TrainingRun) -> None:
        pass

    def event(self, event: Event) -> None:
        pass

    def message(self, text: str) -> None:
        print(text, flush=True)

    def finish(self, run: TrainingRun, folder: RunFolder) -> None:
        pass


def main(file: Path, state: Path) -> int:
    storage = os.path.realpath(state) + os.sep + "tiny/volumes/"

    def forbid(event: str, args: tuple[Any, ...]) -> None:
        if event in {"open", "os.listdir", "os.scandir"} and isinstance(args[0], str | os.PathLike):
            path = os.path.realpath(args[0])
            if path.startswith(storage) and path.count(os.sep) > storage.count(os.sep):
                raise PermissionError(f"{event} of {path}")

    sys.addaudithook(forbid)
    try:
        next((state / "tiny/volumes/x/y").iterdir())
    except PermissionError:
        return run_file(
            file,
            sets=[],
            claims={},
            secrets={},
            state_root=state,
            cache=cache_root(),
            open_view=lambda: nullcontext(Silent()),
        )
    raise AssertionError("the hook forbids nothing")


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
