"""The errors that a person sees, each with the exit code it ends in.

It owns how a user's mistake is told apart from everything else; it must not format for a terminal.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing that is wrong with a resource, and where: `path` is dotted, as in `spec.datasets[0].fraction`."""

    path: str
    message: str
    line: int | None = None
    """Line in the file, from 1, where the resource was read from one."""

    def __str__(self) -> str:
        return f"{self.path}: {self.message}" if self.path else self.message


class UserError(Exception):
    """The user asked for something that cannot be; the message says what to change. Never retried."""

    exit_code = 2


class InvalidResource(UserError):
    """A resource with problems: all of them at once."""

    def __init__(self, problems: tuple[Problem, ...], *, origin: str = "") -> None:
        self.problems = problems
        self.origin = origin
        super().__init__("\n".join(f"{self._where(problem)}{problem}" for problem in problems))

    def _where(self, problem: Problem) -> str:
        """Return `FILE:LINE: `, or what of it is known."""
        if problem.line is None:
            return f"{self.origin}: " if self.origin else ""
        return f"{self.origin}:{problem.line}: " if self.origin else f"line {problem.line}: "
