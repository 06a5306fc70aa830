"""What stands in the way of a run's children, as the requests about them find it.

It owns when a request that does not succeed is an obstacle; it must not make one, nor know what a run does about it.

A request that is refused is one at once. One at which the server fails is tried again by the queue for some seconds,
and is one only if it goes on failing. A server that fails at everything is away, which is no child's fault: whoever
notices that forgets what was found.
"""

from __future__ import annotations

from collections.abc import Awaitable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import TypeVar

import structlog

from posttrain.api import conditions
from posttrain.api.conditions import find_condition
from posttrain.api.training_run import TrainingRun
from posttrain.control.port import ClusterError, InternalError, Rejected
from posttrain.plan.types import ObjectRef

T = TypeVar("T")

READ = "read"
"""The verb of a request that changes nothing."""
_FAILING = timedelta(seconds=5)
"""A webhook that is being restarted is away for as long."""

log = structlog.get_logger(__name__)


class Postponed(Exception):
    """The server failed at a request about a child, which the queue is to try again."""

    def __init__(self, error: InternalError) -> None:
        super().__init__(str(error))
        self.error = error


@dataclass
class Obstacles:
    """What kept a run's children from being made. After a while it is tried again, before any status is written."""

    since: datetime
    foreign: set[ObjectRef] = field(default_factory=set)
    rejected: dict[ObjectRef, str] = field(default_factory=dict)
    failing: dict[tuple[str, ObjectRef], datetime] = field(default_factory=dict)
    """Since when the server fails at a request, by its verb and what it is about."""
    unread: dict[ObjectRef, str] = field(default_factory=dict)
    """What a run refers to and the server does not show."""
    vain: set[tuple[str, ObjectRef]] = field(default_factory=set)
    """The requests that are not worth another try yet."""

    @property
    def refs(self) -> frozenset[ObjectRef]:
        """The children that something keeps, and what they wait for."""
        return frozenset(self.foreign | self.rejected.keys() | self.unread.keys())

    async def ask(
        self, verb: str, request: Awaitable[T], *, about: ObjectRef, run: TrainingRun, now: datetime
    ) -> T | None:
        """Return the answer to a request about a child; None where there is an obstacle.

        Raises:
            Postponed: the server failed at it, and not for long.
            ClusterError: every other answer.
        """
        since = self.failing.pop((verb, about), now)
        try:
            answer = await request
        except Rejected as error:
            self._note(verb, about, error)
            return None
        except InternalError as error:
            self.failing[verb, about] = since
            if now - since < _FAILING and not _tells_of_refusal(run):
                raise Postponed(error) from error
            self._note(verb, about, error)
            name = f"{run.metadata.namespace}/{run.metadata.name}"
            log.warning("goes on failing", run=name, kind=about.kind, name=about.name, error=str(error))
            return None
        return answer

    def _note(self, verb: str, about: ObjectRef, error: ClusterError) -> None:
        (self.unread if verb == READ else self.rejected)[about] = str(error)
        self.vain.add((verb, about))


async def unless_it_fails(request: Awaitable[T], *, what: str) -> T | None:
    """Return the answer to a request that a run can do without; None where the server refuses it, or fails at it."""
    try:
        return await request
    except (Rejected, InternalError) as error:
        log.warning("done without", what=what, error=str(error))
        return None


def _tells_of_refusal(run: TrainingRun) -> bool:
    """Return whether the status does already: then this failure is no news, also to an operator that began since."""
    accepted = find_condition(run.status.conditions, conditions.ACCEPTED)
    return accepted is not None and accepted.reason == "ChildRejected"
