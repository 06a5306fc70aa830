"""The progress writer: what this replica took of every run, and its way into `status.progress`.

It owns what is not in status yet and when it gets there; it must not know HTTP, nor decide what a report means.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Any, TypeVar

import structlog

from posttrain.api.training_run_status import Progress
from posttrain.contract.facts import FactsReply, FactsReport
from posttrain.contract.reports import Report
from posttrain.control.kinds import TRAINING_RUN
from posttrain.control.port import (
    PROGRESS_MANAGER,
    Cluster,
    Conflict,
    NotFound,
    ObjectKey,
    Rejected,
    Unavailable,
)
from posttrain.plan.progress import facts_reply, must_show_at_once, next_progress
from posttrain.plan.types import Manifest

log = structlog.get_logger(__name__)

_T = TypeVar("_T")

_CHECK_SECONDS = 1.0
_GRACE_SECONDS = 2.0
"""So much later than a sender was told: what it then sends goes into the same write."""
_RETRY_SECONDS = 5.0
_IDLE_SECONDS = 600.0
_CONFLICTS_MAX = 8
_REQUESTS_AT_ONCE = 16


@dataclass(frozen=True, order=True)
class RunIdentity:
    """One TrainingRun, and not another of its name that came after it."""

    namespace: str
    name: str
    uid: str

    @property
    def key(self) -> ObjectKey:
        """Its key in the cluster."""
        return ObjectKey(*TRAINING_RUN, self.namespace, self.name)

    def __str__(self) -> str:
        return f"TrainingRun {self.namespace}/{self.name}"


class RunGone(Exception):
    """The run was deleted: nothing that it reports is of use to anybody."""


@dataclass(frozen=True, kw_only=True)
class WriterLimits:
    """How often a run is written, and how much waits in memory."""

    interval_seconds: float = 30.0
    """Between two writes of a run by this replica, where nothing must be shown at once."""
    runs: int = 5000
    reports_per_run: int = 256
    bytes_per_run: int = 256 * 1024


@dataclass(frozen=True, kw_only=True)
class _Taken:
    number: int
    report: Report
    received_at: datetime
    size_bytes: int


@dataclass(kw_only=True)
class _Buffer:
    """What one run is known and waits for; times are on the monotonic clock."""

    run: RunIdentity
    touched_at: float
    waiting: list[_Taken] = field(default_factory=list)
    known: Progress | None = None
    """As it stood in status when this replica last read or wrote it."""
    was_read: bool = False
    taken: int = 0
    written: int = 0
    due_at: float = 0.0
    retry_at: float = 0.0
    trouble: str = ""
    """Why the last write failed."""
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def size_bytes(self) -> int:
        return sum(taken.size_bytes for taken in self.waiting)

    def waits(self) -> bool:
        """Return whether something of the run is not in status yet."""
        return bool(self.waiting)


class ProgressWriter:
    """Folds reports into the status of their runs: at once where it matters, else each run twice a minute.

    Nothing depends on one replica seeing all of a run: facts are acknowledged as status has them, and each write folds
    what waits here into what status holds then. So a replica that is lost loses no fact; steps and beats that it alone
    had heard of come anew.
    """

    def __init__(
        self,
        cluster: Cluster,
        *,
        limits: WriterLimits | None = None,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._cluster = cluster
        self._limits = limits or WriterLimits()
        self._clock = clock
        self._monotonic = monotonic
        self._buffers: OrderedDict[RunIdentity, _Buffer] = OrderedDict()
        self._requests = asyncio.Semaphore(_REQUESTS_AT_ONCE)
        self._tasks: set[asyncio.Task[None]] = set()

    # --- Taking ------------------------------------------------------------------------------------------------------

    async def take(self, run: RunIdentity, report: FactsReport, *, size_bytes: int) -> FactsReply:
        """Take a report and return how far its facts are in status; with them, when to send the others again.

        Raises:
            RunGone: the run was deleted.
            Unavailable: status could not be written; the sender keeps its facts.
        """
        buffer, taken = self._keep(run, report, size_bytes=size_bytes)
        await self._settle(buffer, taken)
        reply = facts_reply(buffer.known or Progress(), report)
        if buffer.written >= taken.number or _is_acknowledged(reply, report):
            return reply
        wait = max(buffer.due_at, buffer.retry_at) - self._monotonic()
        return reply.model_copy(update={"retry_after_seconds": round(max(wait, 1.0), 1)})

    def note(self, run: RunIdentity, report: Report, *, size_bytes: int) -> None:
        """Take a report whose sender must not wait for the API server; it is written as any other.

        Raises:
            Unavailable: too much waits already, since status cannot be written.
        """
        buffer, taken = self._keep(run, report, size_bytes=size_bytes)
        if not buffer.was_read or self._is_due(buffer, report):
            self._spawn(self._log_failure(self._settle(buffer, taken), buffer))

    def _keep(self, run: RunIdentity, report: Report, *, size_bytes: int) -> tuple[_Buffer, _Taken]:
        now = self._monotonic()
        buffer = self._buffers.get(run) or self._add(run)
        if self._is_full(buffer) and (buffer.retry_at > now or buffer.lock.locked()):
            what = buffer.trouble or f"the API server is slow to take the progress of {run}"
            raise Unavailable(what, retry_after=max(buffer.retry_at - now, 1.0))
        self._buffers.move_to_end(run)
        buffer.touched_at = now
        buffer.taken += 1
        taken = _Taken(number=buffer.taken, report=report, received_at=self._clock(), size_bytes=size_bytes)
        buffer.waiting.append(taken)
        return buffer, taken

    def _add(self, run: RunIdentity) -> _Buffer:
        if len(self._buffers) >= self._limits.runs:
            idle = next((known for known, buffer in self._buffers.items() if not buffer.waits()), None)
            if idle is None:
                oldest = next(iter(self._buffers.values()))
                self._spawn(self._log_failure(self._write(oldest, when=oldest.waits), oldest))
                raise Unavailable(
                    f"reports of {len(self._buffers)} runs wait to be written", retry_after=_RETRY_SECONDS
                )
            del self._buffers[idle]
        buffer = _Buffer(run=run, touched_at=self._monotonic())
        self._buffers[run] = buffer
        return buffer

    def _is_full(self, buffer: _Buffer) -> bool:
        limits = self._limits
        return len(buffer.waiting) >= limits.reports_per_run or buffer.size_bytes >= limits.bytes_per_run

    def _is_due(self, buffer: _Buffer, report: Report) -> bool:
        ripe = self._monotonic() >= max(buffer.due_at, buffer.retry_at)
        return ripe or self._is_full(buffer) or must_show_at_once(buffer.known, report)

    def _is_overdue(self, buffer: _Buffer) -> bool:
        ripe_at = max(buffer.due_at + _GRACE_SECONDS, buffer.retry_at)
        return buffer.waits() and self._monotonic() >= ripe_at

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # --- Writing -----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Write what is due, until cancelled."""
        while True:
            await asyncio.sleep(_CHECK_SECONDS)
            await self.write_due()

    async def write_due(self) -> None:
        """Write every run whose time has come without a sender that came again, and forget those that fell silent."""
        now = self._monotonic()
        for run, buffer in list(self._buffers.items()):
            if not buffer.waits() and now - buffer.touched_at >= _IDLE_SECONDS:
                del self._buffers[run]
        due = [buffer for buffer in self._buffers.values() if self._is_overdue(buffer)]
        writes = (self._write(buffer, when=partial(self._is_overdue, buffer)) for buffer in due)
        await asyncio.gather(*map(self._log_failure, writes, due))

    async def close(self, *, timeout_seconds: float = 5.0) -> None:
        """Write everything that waits, as far as the time allows; facts that it did not reach are sent again."""
        buffers = [buffer for buffer in self._buffers.values() if buffer.waits()]
        for buffer in buffers:
            buffer.retry_at = 0.0
        writes = (self._write(buffer, when=buffer.waits) for buffer in buffers)
        try:
            async with asyncio.timeout(timeout_seconds):
                await asyncio.gather(*map(self._log_failure, writes, buffers), *self._tasks)
        except TimeoutError:
            left = sum(buffer.waits() for buffer in buffers)
            log.warning("progress was not written in time", runs=left, seconds=timeout_seconds)

    async def _log_failure(self, writing: Coroutine[Any, Any, None], buffer: _Buffer) -> None:
        try:
            await writing
        except RunGone:
            log.debug("a run is gone", run=str(buffer.run))
        except Unavailable as error:
            log.warning("progress waits", run=str(buffer.run), error=str(error))

    async def _settle(self, buffer: _Buffer, taken: _Taken) -> None:
        """Write a report unless it may wait; what status has is read once before that is judged."""
        if not buffer.was_read:
            await self._read_first(buffer)

        def is_due() -> bool:
            return buffer.written < taken.number and self._is_due(buffer, taken.report)

        if is_due():
            await self._write(buffer, when=is_due)

    async def _read_first(self, buffer: _Buffer) -> None:
        async with buffer.lock:
            if buffer.was_read:
                return
            run = await self._ask(buffer, lambda: self._read(buffer.run))
            buffer.known, buffer.was_read = _progress_of(run), True
            beat = buffer.known.last_beat_time if buffer.known else None
            if beat is not None:
                # Another replica, or this one before it started anew, may have written a moment ago.
                age = max((self._clock() - beat).total_seconds(), 0.0)
                buffer.due_at = self._monotonic() + self._limits.interval_seconds - age

    async def _write(self, buffer: _Buffer, *, when: Callable[[], bool]) -> None:
        """Bring everything into status that waits, if that is still so when those who write already are done.

        A run's pods report within the same moment: the first one's write makes the others' wait for the next.
        """
        async with buffer.lock:
            if when():
                await self._ask(buffer, lambda: self._fold_into_status(buffer))

    async def _fold_into_status(self, buffer: _Buffer) -> None:
        for _ in range(_CONFLICTS_MAX):
            run = await self._read(buffer.run)
            folding = tuple(buffer.waiting)
            progress = _progress_of(run)
            for taken in folding:
                progress = next_progress(progress, taken.report, received_at=taken.received_at)
            try:
                await self._cluster.apply_status(_build_status(run, progress), manager=PROGRESS_MANAGER)
            except Conflict:
                continue
            del buffer.waiting[: len(folding)]
            buffer.known, buffer.was_read = progress, True
            buffer.written = folding[-1].number
            buffer.trouble = ""
            buffer.due_at = self._monotonic() + self._limits.interval_seconds
            return
        raise Unavailable(
            f"{buffer.run} changed {_CONFLICTS_MAX} times while its progress was written", retry_after=1.0
        )

    async def _read(self, run: RunIdentity) -> Manifest:
        found = await self._cluster.get(run.key)
        if found["metadata"]["uid"] != run.uid:
            raise NotFound(f"{run} is another one now")
        return found

    async def _ask(self, buffer: _Buffer, call: Callable[[], Awaitable[_T]]) -> _T:
        """Ask the API server on a run's behalf; after trouble it is left alone for a while."""
        left = buffer.retry_at - self._monotonic()
        if left > 0:
            raise Unavailable(buffer.trouble, retry_after=left)
        try:
            async with self._requests:
                return await call()
        except NotFound as error:
            if self._buffers.get(buffer.run) is buffer:
                del self._buffers[buffer.run]
            raise RunGone(f"{buffer.run} does not exist any more") from error
        except Unavailable as error:
            raise self._note_trouble(buffer, str(error), seconds=error.retry_after or _RETRY_SECONDS) from error
        except Rejected as error:
            log.error("the API server refuses a run's progress", run=str(buffer.run), error=str(error))
            raise self._note_trouble(buffer, str(error), seconds=self._limits.interval_seconds) from error

    def _note_trouble(self, buffer: _Buffer, what: str, *, seconds: float) -> Unavailable:
        buffer.trouble = f"the progress of {buffer.run} could not be written: {what}"
        buffer.retry_at = self._monotonic() + seconds
        return Unavailable(buffer.trouble, retry_after=seconds)


def _progress_of(run: Manifest) -> Progress | None:
    data = (run.get("status") or {}).get("progress")
    return None if data is None else Progress.model_validate(data)


def _build_status(run: Manifest, progress: Progress | None) -> Manifest:
    metadata = run["metadata"]
    return {
        "apiVersion": run["apiVersion"],
        "kind": run["kind"],
        "metadata": {name: metadata[name] for name in ("name", "namespace", "uid", "resourceVersion")},
        "status": {"progress": progress.to_data() if progress else {}},
    }


def _is_acknowledged(reply: FactsReply, report: FactsReport) -> bool:
    reached = {(entry.attempt, entry.source): entry.seq for entry in reply.acknowledged}
    return all(fact.seq <= reached.get((fact.attempt, fact.source), 0) for fact in report.facts)
