"""The resource of a local run: what an API server is to a cluster.

It owns the one copy that the plan's loop and the progress server both write to; it must not decide what they write.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from datetime import datetime
from threading import Lock

from posttrain.api.training_run import TrainingRun
from posttrain.api.training_run_status import Progress, TrainingRunStatus
from posttrain.local.state import RunFolder, write_atomically


def accept_run(given: TrainingRun, *, stored: TrainingRun | None, now: datetime) -> TrainingRun:
    """Return the resource after a file was applied to it: identity and status stay, the spec is the file's."""
    if stored is None:
        metadata = given.metadata.model_copy(
            update={"uid": str(uuid.uuid4()), "generation": 1, "creation_timestamp": now}
        )
        return given.model_copy(update={"metadata": metadata, "status": TrainingRunStatus()})
    # To run a suspended run again means to go on, also where the plan holds it until its spec is touched.
    touched = stored.spec != given.spec or stored.status.stage == "Suspended"
    generation = (stored.metadata.generation or 1) + touched
    metadata = stored.metadata.model_copy(
        update={
            "generation": generation,
            "labels": given.metadata.labels,
            "annotations": given.metadata.annotations,
        }
    )
    return given.model_copy(update={"metadata": metadata, "status": stored.status})


class RunStore:
    """The current resource, on disk and in memory; safe for several threads."""

    def __init__(self, folder: RunFolder, run: TrainingRun) -> None:
        self._folder = folder
        self._lock = Lock()
        self._run = run
        self._write(durable=True)

    @property
    def run(self) -> TrainingRun:
        """The resource as it stands."""
        return self._run

    def write_status(self, status: TrainingRunStatus) -> None:
        """Replace every part of the status but progress."""
        with self._lock:
            merged = status.model_copy(update={"progress": self._run.status.progress})
            if merged != self._run.status:
                self._run = self._run.model_copy(update={"status": merged})
                self._write(durable=True)

    def write_progress(self, fold: Callable[[Progress | None], Progress], *, durable: bool) -> Progress:
        """Replace progress by what `fold` makes of it; `durable` before something is acknowledged."""
        with self._lock:
            progress = fold(self._run.status.progress)
            status = self._run.status.model_copy(update={"progress": progress})
            self._run = self._run.model_copy(update={"status": status})
            self._write(durable=durable)
            return progress

    def suspend(self) -> None:
        """Set spec.suspend."""
        with self._lock:
            metadata = self._run.metadata.model_copy(update={"generation": (self._run.metadata.generation or 1) + 1})
            spec = self._run.spec.model_copy(update={"suspend": True})
            self._run = self._run.model_copy(update={"metadata": metadata, "spec": spec})
            self._write(durable=True)

    def _write(self, *, durable: bool) -> None:
        text = self._run.model_dump_json(by_alias=True, exclude_none=True, indent=2)
        write_atomically(self._folder.resource_file, text + "\n", durable=durable)
