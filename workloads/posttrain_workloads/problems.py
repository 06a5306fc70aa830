"""What is wrong with a run's inputs: a reason of the catalogue and a message, one or many at once.

It owns how such problems are collected and carried; it must not look for any.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from posttrain.contract.result import ExitCode
from posttrain_workloads.runtime import RankFailure

_TRANSIENT = frozenset({"HubUnreachable"})
_TRACEBACK_LINES = 12


@dataclass(frozen=True)
class Problem:
    """One problem; the message names the place in the spec, the likely cause and what to change."""

    reason: str
    message: str

    def __str__(self) -> str:
        return f"{self.reason}: {self.message}"


class InvalidInputs(RankFailure):
    """The run cannot start with these inputs; it ends with the first problem's reason and every problem's message.

    Only where nothing but the network is to blame is it worth another try.
    """

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        transient = all(problem.reason in _TRANSIENT for problem in self.problems)
        one = len(self.problems) == 1  # its reason stands beside the message
        super().__init__(
            self.problems[0].reason,
            self.problems[0].message if one else "\n".join(str(problem) for problem in self.problems),
            exit_code=ExitCode.TRANSIENT if transient else ExitCode.INVALID,
        )


def refuse(reason: str, message: str) -> InvalidInputs:
    """Return the exception for a single problem."""
    return InvalidInputs([Problem(reason, message)])


@dataclass
class Findings:
    """Problems and warnings, in the order in which they were found."""

    problems: list[Problem] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def add(self, problem: Problem) -> None:
        """Keep a problem, once."""
        if problem not in self.problems:
            self.problems.append(problem)

    @contextmanager
    def collect(self) -> Iterator[None]:
        """Keep the problems that the block ends with, instead of ending with them."""
        try:
            yield
        except InvalidInputs as error:
            for problem in error.problems:
                self.add(problem)


def last_lines(error: BaseException, *, skip: str) -> str:
    """Return the last lines of an exception's traceback, without the frames of file `skip` and of importing."""
    summary = traceback.TracebackException.from_exception(error)
    frames = [f for f in summary.stack if f.filename != skip and "importlib" not in f.filename]
    summary.stack = traceback.StackSummary.from_list(frames)
    lines = [line for line in "".join(summary.format()).rstrip().splitlines() if line.strip(" ~^")]
    return "\n".join(lines[-_TRACEBACK_LINES:])
