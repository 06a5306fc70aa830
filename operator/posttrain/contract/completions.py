"""Where the completions of a logged step lie in a run's storage.

It owns the names of those files; it must not read or write any.
"""

from __future__ import annotations

import re

COMPLETIONS_FOLDER = "completions"
_NAME = re.compile(r"step-([0-9]+)\.parquet")


def completions_file(step: int) -> str:
    """Return the file of a step, below the storage."""
    return f"{COMPLETIONS_FOLDER}/step-{step:06d}.parquet"


def step_of_file(name: str) -> int | None:
    """Return the step whose completions a file of that folder holds, or None for what is no such file."""
    match = _NAME.fullmatch(name)
    return int(match.group(1)) if match else None
