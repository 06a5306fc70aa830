"""Programs in completions and what they write: the block of code, the comparison, many runs at the same time.

It owns what all code rewards share; which tests there are and what passing is worth are the rewards' own.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

from posttrain_workloads.rewards.execution import Execution, ExecutionError, Program, Sandbox

T = TypeVar("T")

_log = logging.getLogger(__name__)

_MARKS = {"cpp": r"(?:cpp|c\+\+)", "python": r"(?:python3?|py)", "javascript": r"(?:javascript|js)"}
_PISTONS_NAMES = {"r": "rscript", "cpp": "c++"}
"""Where Piston's name of a language is not the one that blocks are marked with."""


class RunPrograms(Protocol):
    """Runs programs at the same time, as many as the sandbox takes, and returns what each did, in their order."""

    def __call__(self, programs: Sequence[Program], /) -> list[Execution]: ...


def extract_code(text: str, language: str) -> str | None:
    """Return the last block of code that is marked with the language, None where there is none."""
    mark = _MARKS.get(language, re.escape(language))
    blocks = re.findall(rf"```{mark}[ \t]*\n(.*?)```", text, re.DOTALL | re.IGNORECASE)
    return blocks[-1] if blocks else None


def sandbox_language(language: str) -> str:
    """Return the name of a language in a sandbox."""
    return _PISTONS_NAMES.get(language, language)


def same_output(written: str, expected: str) -> bool:
    """Return whether two outputs have the same lines; blanks around a line and empty lines around all do not count."""
    return [line.strip() for line in written.strip().splitlines()] == [
        line.strip() for line in expected.strip().splitlines()
    ]


def batches_of(items: Sequence[T], size: int) -> list[Sequence[T]]:
    """Return the items in batches; a size of -1 makes one of all.

    Raises:
        ValueError: the size is neither -1 nor positive.
    """
    if size == -1:
        return [items] if items else []
    if size < 1:
        raise ValueError(f"test_batch_size must be at least 1, or -1 for all tests at once, not {size}")
    return [items[start : start + size] for start in range(0, len(items), size)]


def score_all(
    reward: str, sandbox: Sandbox, scorers: Sequence[Callable[[RunPrograms], float | None]]
) -> list[float | None]:
    """Return what each scorer gives, many at the same time; None for one whose programs could not be run.

    What a scorer raises else is raised here.
    """
    if not scorers:
        return []
    with (
        ThreadPoolExecutor(sandbox.parallel, thread_name_prefix="sandbox") as runs,
        ThreadPoolExecutor(min(sandbox.parallel, len(scorers)), thread_name_prefix=reward) as scoring,
    ):

        def run(programs: Sequence[Program], /) -> list[Execution]:
            return list(runs.map(sandbox.run, programs))

        def score(place: int) -> float | None:
            try:
                return scorers[place](run)
            except ExecutionError as error:
                _log.warning("%s gives no score to completion %d: %s", reward, place, error)
                return None

        return list(scoring.map(score, range(len(scorers))))
