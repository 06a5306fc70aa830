"""The folder of a run on this machine: where everything lies, who may write to it, how a file is replaced.

It owns the layout and the lock; it must not decide anything about a run.

    .posttrain/<run>/
        resource.json   the resource with its status
        objects/        the run's children, a file each
        pods/           what belongs to one pod: its volumes, its termination message
        volumes/        claims made for the run
        storage         link to the folder that the run writes to
        logs/           <pod>.log
        report.html     the report, made at the end
        packages/       posttrain and posttrain_workloads, for the environments' interpreters
        lock            who executes the run
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from posttrain.api.training_run import TrainingRun, TrainingRunSpec
from posttrain.contract.config import config_hash, immutable_spec
from posttrain.errors import UserError

_SHOWN_DIFFERENCES = 12


def state_root(environ: Mapping[str, str] = os.environ) -> Path:
    """Return the folder that holds a folder a run: $POSTTRAIN_STATE, else .posttrain in the working directory."""
    return Path(environ.get("POSTTRAIN_STATE") or ".posttrain").absolute()


@dataclass(frozen=True)
class RunFolder:
    """One run's folder; it need not exist."""

    path: Path

    @property
    def name(self) -> str:
        """The run's name."""
        return self.path.name

    @property
    def resource_file(self) -> Path:
        """The resource with its status."""
        return self.path / "resource.json"

    @property
    def objects(self) -> Path:
        """The run's children."""
        return self.path / "objects"

    @property
    def pods(self) -> Path:
        """A folder a pod, by uid."""
        return self.path / "pods"

    @property
    def volumes(self) -> Path:
        """A folder a claim that was made for the run."""
        return self.path / "volumes"

    @property
    def storage(self) -> Path:
        """Link to the folder that the run writes checkpoints, facts and the model to."""
        return self.path / "storage"

    @property
    def logs(self) -> Path:
        """The logs, a file a pod."""
        return self.path / "logs"

    @property
    def packages(self) -> Path:
        """What the environments' interpreters import posttrain and posttrain_workloads from."""
        return self.path / "packages"

    @property
    def lock_file(self) -> Path:
        """Locked while the run is executed."""
        return self.path / "lock"

    def object_file(self, kind: str, name: str) -> Path:
        """Return the file of one of the run's children."""
        return self.objects / f"{kind}-{name}.json"

    def log_file(self, pod: str) -> Path:
        """Return the file with both outputs of a pod's container."""
        return self.logs / f"{pod}.log"

    def locate(self, uri: str) -> Path | None:
        """Return where something lies that the run wrote, `pvc://<claim>/<run>/<path>`; None for what it did not."""
        _, _, place = uri.removeprefix("pvc://").partition("/")
        run, _, path = place.partition("/")
        return self.storage / path if uri.startswith("pvc://") and run == self.name else None

    def read_run(self) -> TrainingRun | None:
        """Return the resource as it was written last; None if there is none.

        Raises:
            UserError: the file is not of this version.
        """
        try:
            text = self.resource_file.read_text()
        except (FileNotFoundError, NotADirectoryError):
            return None
        try:
            return TrainingRun.model_validate_json(text)
        except ValidationError as error:
            raise UserError(
                f"{self.resource_file} cannot be read ({error.error_count()} problems, the first: "
                f"{error.errors()[0]['msg']}): another version of posttrain wrote it. Remove {self.path} to start anew."
            ) from None

    def clear(self) -> None:
        """Remove everything but the lock."""
        for entry in self.path.iterdir():
            if entry == self.lock_file:
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()


def list_runs(root: Path) -> list[RunFolder]:
    """Return the folders of all runs under `root`, by name."""
    return [RunFolder(file.parent) for file in sorted(root.glob("*/resource.json"))]


@dataclass(frozen=True, kw_only=True)
class LockHolder:
    """Who executes a run."""

    pid: int
    since: datetime
    command: str


@contextmanager
def locked(folder: RunFolder, *, command: str) -> Iterator[None]:
    """Hold the run's lock; the system gives it back however this process ends.

    Raises:
        UserError: another process executes the run, or the folder cannot be made or written to.
    """
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        opened = folder.lock_file.open("a+")
    except OSError as error:
        raise UserError(
            f"{folder.path} cannot be written to ({error.strerror}): say where runs are kept with --state FOLDER or "
            "$POSTTRAIN_STATE"
        ) from None
    with opened as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(_refusal(folder)) from None
        handle.truncate(0)
        since = datetime.now(UTC).isoformat(timespec="seconds")
        handle.write(json.dumps({"pid": os.getpid(), "since": since, "command": command}) + "\n")
        handle.flush()
        yield


def lock_holder(folder: RunFolder) -> LockHolder | None:
    """Return who executes the run just now; None if nobody does."""
    try:
        with folder.lock_file.open("r+") as handle:
            with suppress(BlockingIOError):
                fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return None
            data = json.loads(handle.read())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return LockHolder(pid=data["pid"], since=datetime.fromisoformat(data["since"]), command=data["command"])


def _refusal(folder: RunFolder) -> str:
    holder = lock_holder(folder)
    if holder is None:
        return f"run {folder.name!r} is being executed by a process that is just starting or ending: try again"
    since = holder.since.astimezone().strftime("%Y-%m-%d %H:%M:%S")
    return (
        f"run {folder.name!r} is already being executed by process {holder.pid} since {since} ({holder.command}): "
        f"watch it with `posttrain status {folder.name}`, or stop it with `kill {holder.pid}`, which lets it write a "
        "checkpoint first"
    )


def find_spec_changes(old: TrainingRunSpec, new: TrainingRunSpec) -> list[str]:
    """Return the dotted paths of the fields in which two specs differ and must not; empty where none do.

    On one machine there is no quota to wait for, so the gang's shape is as fixed as the rest.
    """
    if config_hash(old) == config_hash(new) and _shape(old) == _shape(new):
        return []
    before = {**_flatten(immutable_spec(old), path="spec"), **_shape(old)}
    after = {**_flatten(immutable_spec(new), path="spec"), **_shape(new)}
    return sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))


def _shape(spec: TrainingRunSpec) -> dict[str, Any]:
    resources = spec.resources
    return {"spec.resources.numNodes": resources.num_nodes, "spec.resources.profile": resources.profile}


def refuse_changed_spec(folder: RunFolder, *, changes: list[str]) -> UserError:
    """Return the refusal of a run whose folder holds another spec."""
    shown = ", ".join(changes[:_SHOWN_DIFFERENCES])
    if len(changes) > _SHOWN_DIFFERENCES:
        shown += f" and {len(changes) - _SHOWN_DIFFERENCES} more"
    return UserError(
        f"{folder.path} holds a run {folder.name!r} of another spec, and a run's spec does not change once it has been "
        f"trained: {shown} differ. Give this one another metadata.name, or remove that folder to start anew."
    )


def _flatten(value: Any, *, path: str) -> dict[str, Any]:
    if isinstance(value, dict) and value:
        return {at: leaf for key in value for at, leaf in _flatten(value[key], path=f"{path}.{key}").items()}
    if isinstance(value, list) and value:
        return {at: leaf for i, item in enumerate(value) for at, leaf in _flatten(item, path=f"{path}[{i}]").items()}
    return {path: value}


def write_atomically(file: Path, text: str, *, durable: bool = True, private: bool = False) -> None:
    """Replace a file: a reader, and a crash, finds the old text or the new one. `durable`: a power cut too.

    `private`: nobody but this user may read it.
    """
    temporary = file.with_name(f".{file.name}.new")
    temporary.unlink(missing_ok=True)
    temporary.touch(mode=0o600 if private else 0o666)
    with temporary.open("w") as handle:
        handle.write(text)
        if durable:
            handle.flush()
            os.fsync(handle.fileno())
    temporary.replace(file)
    if durable:
        folder = os.open(file.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
