"""Leading, as often as it takes: compete for the lease, work while it is held, and compete again when it was lost.

It owns that the work of one term has ended before the next is competed for; it must not know what the work is, nor how
a lease is won. A lost lease ends no process: while the API server is down nobody can hold it, and a process that ended
would be started over and over, and take the progress server down with it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog

from posttrain.control.lease import Election, Lost
from posttrain.control.operator import Operator

log = structlog.get_logger(__name__)


class Leadership:
    """One replica's terms as the leader."""

    def __init__(self, election: Election, *, build_operator: Callable[[], Operator]) -> None:
        self._election = election
        self._build_operator = build_operator
        self._operator: Operator | None = None

    async def run(self) -> None:
        """Wait for the lead and work, again and again, until cancelled. An error of the work itself passes through."""
        while True:
            await self._election.acquire()
            try:
                await self._lead()
            except* Lost as lost:
                log.warning("not leading any more: the work has stopped", because=str(lost.exceptions[0]))

    async def _lead(self) -> None:
        # Of a term of its own: what an earlier one has seen is out of date, and what still reports to it is not heard.
        self._operator = self._build_operator()
        try:
            # The group waits for every task of the work before it lets an error out.
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._election.hold(), name="lease")
                tasks.create_task(self._operator.run(), name="operator")
        finally:
            self._operator.close()
            self._operator = None

    def unready(self) -> list[str]:
        """Return what keeps this replica from its work; a replica that waits serves progress all the same."""
        if self._election.problem is not None:
            return [f"lease: {self._election.problem}"]
        if self._election.holder is None:
            return ["lease: not read yet"]
        if self._operator is None:
            return []
        return self._operator.unready()
