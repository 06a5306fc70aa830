"""Facts on their way: appended to the run's storage, fsynced, and posted until they are acknowledged.

It owns facts.jsonl, what of it was acknowledged, and the posting. It must not decide what is worth a fact, and it never
raises into, blocks or slows what it reports on.
"""

from __future__ import annotations

import fcntl
import http.client
import logging
import os
import queue
import random
import ssl
import threading
import time
import urllib.request
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path

from pydantic import ValidationError

from posttrain.contract import environment
from posttrain.contract.config import RunIdentity, TrainingConfig
from posttrain.contract.facts import (
    BODY_MAX_BYTES,
    FACT,
    METRICS_MAX_COUNT,
    AcknowledgedSource,
    Fact,
    FactBody,
    FactsReply,
    FactsReport,
    Phase,
    is_urgent,
)

logger = logging.getLogger(__name__)

Key = tuple[int, str, int]
"""Attempt, source, seq: the order in which the server takes facts."""

POST_TIMEOUT_SECONDS = 5.0
POST_INTERVAL_SECONDS = 1.0
BEAT_INTERVAL_SECONDS = 10.0
BACKOFF_MAX_SECONDS = 30.0
HOLD_MAX_SECONDS = 60.0
"""However long the server asks to wait with what it has taken."""
FACTS_FILES = "facts*.json*"
"""Every node's facts, and how far they were acknowledged."""
_QUEUE_MAX = 10_000
_UNSENT_MAX = 20_000
_ENVELOPE_BYTES = 1024
# In these phases nothing ticks, so that the process lives is all there is to say. In the others a beat must be earned
# by `beat()`: a gang that hangs must not look alive.
_WITHOUT_STEPS: frozenset[Phase | None] = frozenset({None, "preparing", "loading", "saving"})


class FactLog:
    """The facts of one node: one line each, never changed; beside it, how far each source was acknowledged."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._acknowledged_path = path.with_name(f"{path.stem}.ack.json")

    def last_seq(self, *, attempt: int, source: str) -> int:
        """Return the highest sequence number of a source; 0 if it has none."""
        return max((f.seq for f in self._read() if (f.attempt, f.source) == (attempt, source)), default=0)

    def append(self, fact: Fact) -> None:
        """Write a fact and wait until it is on disk.

        Raises:
            OSError: it could not be written.
        """
        with self.path.open("a+b") as file:
            # A line that a killed process left half written must not swallow this one.
            size = file.seek(0, os.SEEK_END)
            torn = size > 0 and os.pread(file.fileno(), 1, size - 1) != b"\n"
            file.write((b"\n" if torn else b"") + FACT.dump_json(fact) + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def unacknowledged(self) -> list[Fact]:
        """Return what was never acknowledged, of whatever attempt and source, in the order to send it."""
        known = self._acknowledged()
        left = {_key(f): f for f in self._read() if f.seq > known.get((f.attempt, f.source), 0)}
        return [left[key] for key in sorted(left)]

    def acknowledge(self, entries: Iterable[AcknowledgedSource]) -> None:
        """Remember how far sources were acknowledged; several processes may do so at once.

        Raises:
            OSError: it could not be written.
        """
        with self._acknowledged_path.open("a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            known = _parse_acknowledged(file.read())
            for entry in entries:
                source = (entry.attempt, entry.source)
                known[source] = max(entry.seq, known.get(source, 0))
            reply = FactsReply(
                acknowledged=tuple(
                    AcknowledgedSource(attempt=a, source=s, seq=n) for (a, s), n in sorted(known.items())
                )
            )
            file.seek(0)
            file.truncate()
            file.write(reply.model_dump_json())

    def _acknowledged(self) -> dict[tuple[int, str], int]:
        try:
            return _parse_acknowledged(self._acknowledged_path.read_text())
        except FileNotFoundError:
            return {}

    def _read(self) -> list[Fact]:
        try:
            lines = self.path.read_bytes().splitlines()
        except FileNotFoundError:
            return []
        facts = []
        for line in lines:
            try:
                facts.append(FACT.validate_json(line))
            except ValidationError:
                continue  # torn by a kill: it was never acknowledged, and its number was given again
        return facts


def _parse_acknowledged(text: str) -> dict[tuple[int, str], int]:
    try:
        reply = FactsReply.model_validate_json(text)
    except ValidationError:
        return {}  # empty or torn: facts are sent again, which does no harm
    return {(entry.attempt, entry.source): entry.seq for entry in reply.acknowledged}


def _key(fact: Fact) -> Key:
    return (fact.attempt, fact.source, fact.seq)


class FactClient:
    """One address that reports are posted to."""

    def __init__(self, url: str, *, token_file: Path | None, ca_file: Path | None) -> None:
        self.url = url
        self._token_file = token_file
        self._ca_file = ca_file

    def post(self, report: FactsReport) -> FactsReply:
        """Post a report and return the answer.

        Raises:
            OSError, http.client.HTTPException, ValueError: it did not arrive, or the answer is none.
        """
        headers = {"Content-Type": "application/json"}
        # Both files are projected and renewed while the process runs.
        if self._token_file and self._token_file.exists():
            headers["Authorization"] = f"Bearer {self._token_file.read_text().strip()}"
        context = None
        if self._ca_file and self._ca_file.exists() and self._ca_file.stat().st_size:
            context = ssl.create_default_context(cafile=str(self._ca_file))
        # Straight to the server: a proxy set for the Hub does not know the cluster's services.
        opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
        )
        request = urllib.request.Request(self.url, data=report.model_dump_json().encode(), headers=headers)
        with opener.open(request, timeout=POST_TIMEOUT_SECONDS) as response:
            return FactsReply.model_validate_json(response.read(BODY_MAX_BYTES))


class Reporter:
    """Takes facts and beats without waiting, and sees to the rest in two threads: one writes, one posts."""

    def __init__(
        self,
        *,
        attempt: int,
        source: str,
        log: FactLog | None,
        client: FactClient | None,
        beat_seconds: float = BEAT_INTERVAL_SECONDS,
    ) -> None:
        self._attempt = attempt
        self._source = source
        self._log = log
        self._client = client
        self._beat_seconds = beat_seconds
        self._bodies: queue.Queue[tuple[datetime, FactBody] | None] = queue.Queue(_QUEUE_MAX)
        self._changed = threading.Condition()
        self._unsent: dict[Key, Fact] = {}
        self._held_until = 0.0
        """Until then the server has taken what is unsent, and it waits; on the monotonic clock."""
        self._urgent = False
        self._unwritten = 0
        self._phase: Phase | None = None
        self._step: int | None = None
        self._alive = True
        self._flushing = False
        self._try_now = False
        self._closing = False
        self._warned: set[str] = set()
        self._threads = [
            threading.Thread(target=self._write_facts, name="facts-writer", daemon=True),
            threading.Thread(target=self._post_reports, name="facts-sender", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def send(self, body: FactBody) -> None:
        """Take a fact."""
        with self._changed:
            self._unwritten += 1
            self._alive = True
        try:
            self._bodies.put_nowait((datetime.now(UTC), body))
        except queue.Full:
            self._forget_unwritten()
            self._warn("full", "facts come faster than the storage takes them: some are lost")

    def beat(self, *, phase: Phase | None = None, step: int | None = None) -> None:
        """Take a sign of life: the next beat that is due may be sent, with this phase and step."""
        self._alive = True
        if phase is not None:
            self._phase = phase
        if step is not None:
            self._step = step

    def resend(self) -> None:
        """Send what the log still holds unacknowledged, of other sources and earlier attempts too."""
        if self._log is None:
            return
        try:
            facts = self._log.unacknowledged()
        except OSError as error:
            self._warn("read", f"facts of earlier attempts cannot be read: {error}")
            return
        with self._changed:
            self._unsent = {**{_key(fact): fact for fact in facts}, **self._unsent}
            self._urgent |= any(is_urgent(fact.body) for fact in facts)
            self._changed.notify_all()

    def flush(self, *, timeout_seconds: float) -> bool:
        """Wait until everything is written and acknowledged; tell whether it was in time."""
        deadline = time.monotonic() + timeout_seconds
        with self._changed:
            self._flushing = self._try_now = True
            self._changed.notify_all()
            done = self._changed.wait_for(self._is_settled, timeout=max(deadline - time.monotonic(), 0))
            self._flushing = self._try_now = False
        return done

    def close(self, *, timeout_seconds: float = 5.0) -> bool:
        """Flush and end both threads; tell whether everything was acknowledged."""
        done = self.flush(timeout_seconds=timeout_seconds)
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        try:
            self._bodies.put_nowait(None)
        except queue.Full:
            return False  # the storage hangs; the threads end with the process
        return done

    def _is_settled(self) -> bool:
        return self._unwritten == 0 and (self._client is None or not self._unsent)

    def _forget_unwritten(self) -> None:
        with self._changed:
            self._unwritten -= 1
            self._changed.notify_all()

    def _warn(self, what: str, message: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            logger.warning("%s", message)

    # --- The writing thread ------------------------------------------------------------------------------------------

    def _write_facts(self) -> None:
        seq = self._last_seq()
        while (item := self._bodies.get()) is not None:
            seq += 1
            when, body = item
            fact = Fact(attempt=self._attempt, source=self._source, seq=seq, time=when, body=body)
            if self._log is not None:
                try:
                    self._log.append(fact)
                except OSError as error:  # a full disk is itself worth reporting: post what cannot be kept
                    self._warn("write", f"facts cannot be written to {self._log.path}: {error}")
            with self._changed:
                self._unwritten -= 1
                # Beyond this many the rest waits in the log for the next process.
                if self._client is not None and len(self._unsent) < _UNSENT_MAX:
                    self._unsent[_key(fact)] = fact
                    self._urgent |= is_urgent(body)
                self._changed.notify_all()

    def _last_seq(self) -> int:
        if self._log is None:
            return 0
        try:
            return self._log.last_seq(attempt=self._attempt, source=self._source)
        except OSError as error:
            self._warn("read", f"earlier facts cannot be read: {error}")
            return 0

    # --- The posting thread ------------------------------------------------------------------------------------------

    def _post_reports(self) -> None:
        if self._client is None:
            return
        failures = 0
        while True:
            with self._changed:
                # With nothing to send: until a beat is due, or the server's time to send again has come.
                held = self._held_until - time.monotonic() if self._unsent else self._beat_seconds
                self._changed.wait_for(
                    lambda: self._is_due() or self._closing, timeout=max(min(self._beat_seconds, held), 0)
                )
                if self._closing:
                    return
                report = self._next_report()
            if report is not None:
                failures = 0 if self._post(report, client=self._client) else failures + 1
            self._pause(failures)

    def _pause(self, failures: int) -> None:
        seconds = POST_INTERVAL_SECONDS
        if failures:
            seconds = min(2.0 ** min(failures, 10) * 0.5, BACKOFF_MAX_SECONDS) * random.uniform(0.75, 1.25)
        with self._changed:
            held = self._held_until > time.monotonic()
            self._changed.wait_for(
                lambda: self._closing or self._try_now or (self._flushing and not failures and not held),
                timeout=seconds,
            )
            self._try_now = False

    def _is_due(self) -> bool:
        """Return whether facts are to be sent now: not what the server has taken, unless something new is urgent."""
        ripe = self._urgent or self._flushing or time.monotonic() >= self._held_until
        return bool(self._unsent) and ripe

    def _next_report(self) -> FactsReport | None:
        due = self._is_due()
        if not due and not self._alive and self._phase not in _WITHOUT_STEPS:
            return None
        self._alive = False
        batch: list[Fact] = []
        if due:
            # All of it, and not the news alone: another replica may answer, and what follows a gap is not taken.
            self._urgent = False
            room = BODY_MAX_BYTES - _ENVELOPE_BYTES
            for key in sorted(self._unsent)[:METRICS_MAX_COUNT]:
                room -= len(FACT.dump_json(self._unsent[key])) + 1
                if room < 0 and batch:
                    break
                batch.append(self._unsent[key])
        return FactsReport(
            attempt=self._attempt,
            source=self._source,
            phase=self._phase,
            step=self._step,
            waiting=bool(batch) and (self._flushing or len(batch) < len(self._unsent)),
            facts=tuple(batch),
        )

    def _post(self, report: FactsReport, *, client: FactClient) -> bool:
        try:
            reply = client.post(report)
        except (OSError, http.client.HTTPException, ValueError) as error:
            self._warn("post", f"{client.url} does not take facts ({error}): they are kept and sent again")
            with self._changed:
                self._held_until = 0.0
            return False
        self._warned.discard("post")
        if not report.facts:
            return True
        reached = {(entry.attempt, entry.source): entry.seq for entry in reply.acknowledged}
        taken = [fact for fact in report.facts if fact.seq <= reached.get((fact.attempt, fact.source), 0)]
        if taken and self._log is not None:
            try:
                self._log.acknowledge(reply.acknowledged)
            except OSError as error:
                self._warn("acknowledge", f"what was acknowledged cannot be written: {error}")
        hold = reply.retry_after_seconds
        with self._changed:
            for fact in taken:
                self._unsent.pop(_key(fact), None)
            self._held_until = time.monotonic() + min(hold, HOLD_MAX_SECONDS) if hold is not None else 0.0
            self._changed.notify_all()
        return bool(taken) or hold is not None


def open_reporter(
    config: TrainingConfig, *, environ: Mapping[str, str], source: str, node: int = 0, keep: bool = True
) -> Reporter:
    """Return the reporter of this process.

    `keep=False` writes nothing into the storage: it is another run's.
    """
    url = environ.get(environment.FACTS_URL)
    token_file, ca_file = environ.get(environment.TOKEN), environ.get(environment.CA_CERT)
    client = None
    if url:
        client = FactClient(
            url, token_file=Path(token_file) if token_file else None, ca_file=Path(ca_file) if ca_file else None
        )
    log = FactLog(Path(environ[environment.STORAGE]) / facts_file(config.run, node=node)) if keep else None
    return Reporter(attempt=config.attempt, source=source, log=log, client=client)


def facts_file(run: RunIdentity, *, node: int) -> str:
    """Return the name of a node's facts file.

    A run that was deleted and applied again goes on in the same storage, and its status knows nothing of the facts that
    were acknowledged before: so each resource has files of its own, and numbers from one.
    """
    parts = ["facts", *([run.uid] if run.uid else []), *([str(node)] if node else [])]
    return "-".join(parts) + ".jsonl"
