"""A clock that a test sets: the same time as a datetime, as seconds since 1970, and as monotonic seconds."""

from __future__ import annotations

from datetime import datetime

from tests.support.builders import at


class Clock:
    """Stands still until it is advanced."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def advance(self, seconds: float) -> None:
        self.seconds += seconds

    def now(self) -> datetime:
        return at(self.seconds)

    def wall(self) -> float:
        return self.now().timestamp()

    def monotonic(self) -> float:
        return 1000.0 + self.seconds
