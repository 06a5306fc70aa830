"""`LocalCluster`: the objects of one run's plan, executed as processes of this machine.

It owns the objects, their pods and the processes of those, all of it for exactly the kinds that a plan uses; it must
not decide what ought to be there, nor read what a run writes into its storage.

Everything happens in the thread that calls it. The only thing that comes from elsewhere is a container's end: it is
put into a queue, `notify` is called, and the next `observe` takes it up.
"""

from __future__ import annotations

import json
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Protocol

from posttrain.api.training_run_status import TrainingRunStatus
from posttrain.local.container import Container, Ended, ProcessId
from posttrain.local.jobs import JobOutcome, Rendezvous, reconcile_job, reconcile_pytorchjob
from posttrain.local.leftovers import end_leftovers
from posttrain.local.pod_process import Site, build_process
from posttrain.local.pods import (
    ended_status,
    format_time,
    grace_seconds,
    is_being_deleted,
    is_finished,
    is_owned_by,
    lost_status,
    new_metadata,
    running_status,
    vanished_status,
)
from posttrain.local.state import RunFolder, write_atomically
from posttrain.local.store import RunStore
from posttrain.local.volumes import TERMINATION_FILE, make_volumes
from posttrain.plan.labels import ATTEMPT
from posttrain.plan.types import Manifest, ObjectRef, Observed

KINDS = frozenset(
    {
        ("v1", "ServiceAccount"),
        ("v1", "PersistentVolumeClaim"),
        ("v1", "ConfigMap"),
        ("networking.k8s.io/v1", "NetworkPolicy"),
        ("batch/v1", "Job"),
        ("kubeflow.org/v1", "PyTorchJob"),
    }
)

_PROCESS = "posttrain.dev/process"
"""Annotation of a local pod: the ids by which its processes are found again."""
_ADDRESS = "127.0.0.1"
_CLOSE_SECONDS = 10.0


class Tokens(Protocol):
    """Who lets a pod report its progress."""

    def issue(self, *, attempt: int) -> str:
        """Return a token with which a pod of that attempt may report."""

    def revoke(self, token: str) -> None:
        """Take the token back: its pod has ended."""


@dataclass
class _Pod:
    """A pod, and its container while it runs."""

    manifest: Manifest
    folder: Path
    container: Container | None = None
    token: str | None = None

    @property
    def name(self) -> str:
        return str(self.manifest["metadata"]["name"])


class LocalCluster:
    """The objects of one run."""

    def __init__(
        self,
        folder: RunFolder,
        *,
        store: RunStore,
        site: Site,
        claims: Mapping[str, Path],
        config_maps: Mapping[str, Mapping[str, str]],
        runs: Mapping[str, Manifest],
        tokens: Tokens,
        notify: Callable[[], None],
        clock: Callable[[], datetime],
    ) -> None:
        self._folder = folder
        self._store = store
        self._site = site
        self._claims = claims
        self._config_maps = config_maps
        self._runs = runs
        self._tokens = tokens
        self._notify = notify
        self._clock = clock
        self._ended: SimpleQueue[tuple[str, Ended | None]] = SimpleQueue()
        self._retry_at: datetime | None = None
        self._no_grace = False
        for part in (folder.objects, folder.pods, folder.volumes, folder.logs):
            part.mkdir(parents=True, exist_ok=True)
        self._objects, self._pods = self._load()
        self._bury_lost_pods()

    # --- The port ----------------------------------------------------------------------------------------------------

    def apply(self, manifest: Manifest) -> None:
        """Create an object, or replace what the plan says of it."""
        ref = ObjectRef.of(manifest)
        assert (ref.api_version, ref.kind) in KINDS, f"no plan has a {ref.kind}"
        known = self._objects.get(ref)
        if known is None:
            applied = {**manifest, "metadata": new_metadata(manifest["metadata"], now=self._clock())}
            if ref.kind == "PersistentVolumeClaim":
                applied["status"] = {"phase": "Bound"}
        else:
            applied = {**known, **manifest, "metadata": {**known["metadata"], **manifest["metadata"]}}
        if applied != known:
            self._write(applied)
            self._notify()

    def apply_status(self, status: TrainingRunStatus) -> None:
        """Write every field of the run's status that the operator owns."""
        self._store.write_status(status)

    def delete(self, ref: ObjectRef) -> None:
        """Delete an object; the pods that it controls go with it, each when its container has ended."""
        manifest = self._objects.pop(ref, None)
        if manifest is None:
            return
        self._file(ref).unlink(missing_ok=True)
        for pod in list(self._pods.values()):
            if is_owned_by(pod.manifest, manifest):
                self._delete_pod(pod)
        self._notify()

    def get(self, ref: ObjectRef) -> Manifest | None:
        """Return an object with its status, or None."""
        if ref.kind == "Pod":
            return self._pods[ref.name].manifest if ref.name in self._pods else None
        return self._objects.get(ref)

    def list(self, kind: str) -> list[Manifest]:
        """Return every object of a kind, by name."""
        known = (pod.manifest for pod in self._pods.values()) if kind == "Pod" else self._objects.values()
        found = [manifest for manifest in known if manifest["kind"] == kind]
        return sorted(found, key=lambda manifest: str(manifest["metadata"]["name"]))

    def observe(self) -> Observed:
        """Take up what has happened, let the jobs react to it, and return the facts that a plan needs."""
        self._take_up_ends()
        self._run_controllers()
        return Observed(
            objects=dict(self._objects),
            pods=tuple(self.list("Pod")),
            config_maps=self._config_maps,
            runs=self._runs,
        )

    # --- The executor ------------------------------------------------------------------------------------------------

    @property
    def retry_at(self) -> datetime | None:
        """When a job will start a pod again without anything else happening."""
        return self._retry_at

    @property
    def has_live_pods(self) -> bool:
        """Whether a container runs; what has just ended counts until the next `observe`."""
        return any(pod.container is not None for pod in self._pods.values())

    def kill(self) -> None:
        """End every container at once, and every later one without a grace period."""
        self._no_grace = True
        for pod in self._pods.values():
            if pod.container is not None:
                pod.container.terminate(grace_seconds=0)

    def close(self) -> None:
        """End every container: nothing goes on when this process goes."""
        containers = [pod.container for pod in self._pods.values() if pod.container is not None]
        deadline = time.monotonic() + _CLOSE_SECONDS
        for container in containers:
            container.terminate(grace_seconds=_CLOSE_SECONDS / 2)
        for container in containers:
            container.wait(timeout_seconds=max(deadline - time.monotonic(), 0))
        self._take_up_ends()

    def _take_up_ends(self) -> None:
        while True:
            try:
                uid, ended = self._ended.get_nowait()
            except Empty:
                return
            pod = next(pod for pod in self._pods.values() if pod.manifest["metadata"]["uid"] == uid)
            self._end_pod(pod, ended)

    def _run_controllers(self) -> None:
        now = self._clock()
        retries = []
        for ref, job in list(self._objects.items()):
            outcome = self._reconcile(ref, job, now=now)
            if outcome is None:
                continue
            for manifest in outcome.create:
                self._start_pod(manifest)
            for name in outcome.delete:
                self._delete_pod(self._pods[name])
            if outcome.retry_at is not None:
                retries.append(outcome.retry_at)
            if outcome.status != job.get("status"):
                self._write({**job, "status": outcome.status})
                self._notify()
        self._retry_at = min(retries, default=None)

    def _reconcile(self, ref: ObjectRef, job: Manifest, *, now: datetime) -> JobOutcome | None:
        pods = [pod.manifest for pod in self._pods.values() if is_owned_by(pod.manifest, job)]
        match ref.kind:
            case "PyTorchJob":
                rendezvous = Rendezvous(address=_ADDRESS, port=0 if job.get("status") else _free_port())
                return reconcile_pytorchjob(job, pods, rendezvous=rendezvous, now=now)
            case "Job":
                return reconcile_job(job, pods, now=now)
        return None

    # --- Pods --------------------------------------------------------------------------------------------------------

    def _start_pod(self, manifest: Manifest) -> None:
        uid = manifest["metadata"]["uid"]
        pod = _Pod(manifest=manifest, folder=self._folder.pods / uid)
        pod.token = self._tokens.issue(attempt=int(manifest["metadata"]["labels"][ATTEMPT]))
        self._pods[pod.name] = pod
        # Before its process: whatever happens now, the next start finds a pod to bury.
        self._write_pod(pod, manifest)
        working_folder = pod.folder / "work"
        working_folder.mkdir(parents=True)
        roots = make_volumes(
            manifest,
            folder=pod.folder,
            claim=self._claim_folder,
            config_map=lambda name: self._objects[ObjectRef("v1", "ConfigMap", name)],
            token=pod.token,
        )
        pod.container = Container(
            build_process(manifest, roots=roots, cwd=working_folder, site=self._site),
            log=self._folder.log_file(pod.name),
            on_end=lambda ended: self._announce(uid, ended),
        )
        processes = [pod.container.shim, pod.container.main]
        annotations = {
            **manifest["metadata"].get("annotations", {}),
            _PROCESS: json.dumps([[process.pid, process.start_ticks] for process in processes]),
        }
        metadata = {**manifest["metadata"], "annotations": annotations}
        status = running_status(manifest, started_at=pod.container.started_at)
        self._write_pod(pod, {**manifest, "metadata": metadata, "status": status})
        self._notify()

    def _announce(self, uid: str, ended: Ended | None) -> None:
        self._ended.put((uid, ended))
        self._notify()

    def _end_pod(self, pod: _Pod, ended: Ended | None) -> None:
        pod.container = None
        if pod.token is not None:
            self._tokens.revoke(pod.token)
        if ended is None:
            # The main process died with its shim; what was below it did not.
            end_leftovers(pod.folder)
            status = vanished_status(pod.manifest, now=self._clock())
        else:
            message = (pod.folder / TERMINATION_FILE).read_text(errors="replace")
            status = ended_status(pod.manifest, ended, message=message)
        if is_being_deleted(pod.manifest):
            self._remove_pod(pod)
        else:
            self._write_pod(pod, {**pod.manifest, "status": status})

    def _delete_pod(self, pod: _Pod) -> None:
        if pod.container is None:
            self._remove_pod(pod)
            return
        if is_being_deleted(pod.manifest):
            return
        grace = 0 if self._no_grace else grace_seconds(pod.manifest)
        deletion = {
            "deletionTimestamp": format_time(self._clock() + timedelta(seconds=grace)),
            "deletionGracePeriodSeconds": grace,
        }
        self._write_pod(pod, {**pod.manifest, "metadata": {**pod.manifest["metadata"], **deletion}})
        pod.container.terminate(grace_seconds=grace)

    def _remove_pod(self, pod: _Pod) -> None:
        del self._pods[pod.name]
        self._file(ObjectRef.of(pod.manifest)).unlink(missing_ok=True)
        shutil.rmtree(pod.folder, ignore_errors=True)

    def _bury_lost_pods(self) -> None:
        """End what is left of an earlier `posttrain run` that was killed, and show its pods as lost."""
        unfinished = [pod for pod in self._pods.values() if not is_finished(pod.manifest)]
        end_leftovers(self._folder.pods, recorded=[p for pod in unfinished for p in _recorded_processes(pod.manifest)])
        owners = {manifest["metadata"]["uid"] for manifest in self._objects.values()}
        for pod in list(self._pods.values()):
            orphaned = pod.manifest["metadata"]["ownerReferences"][0]["uid"] not in owners
            if orphaned or is_being_deleted(pod.manifest):
                self._remove_pod(pod)
        for pod in unfinished:
            if pod.name in self._pods:
                self._write_pod(pod, {**pod.manifest, "status": lost_status(pod.manifest, now=self._clock())})

    def _claim_folder(self, claim: str) -> Path:
        return self._claims.get(claim) or self._folder.volumes / claim

    # --- Files -------------------------------------------------------------------------------------------------------

    def _load(self) -> tuple[dict[ObjectRef, Manifest], dict[str, _Pod]]:
        objects: dict[ObjectRef, Manifest] = {}
        pods: dict[str, _Pod] = {}
        for file in sorted(self._folder.objects.glob("*.json")):
            manifest: Manifest = json.loads(file.read_text())
            if manifest["kind"] == "Pod":
                pod = _Pod(manifest=manifest, folder=self._folder.pods / manifest["metadata"]["uid"])
                pods[pod.name] = pod
            else:
                objects[ObjectRef.of(manifest)] = manifest
        return objects, pods

    def _file(self, ref: ObjectRef) -> Path:
        return self._folder.objects / f"{ref.kind}-{ref.name}.json"

    def _write(self, manifest: Manifest) -> None:
        ref = ObjectRef.of(manifest)
        self._objects[ref] = manifest
        write_atomically(self._file(ref), json.dumps(manifest, indent=2) + "\n")

    def _write_pod(self, pod: _Pod, manifest: Manifest) -> None:
        pod.manifest = manifest
        write_atomically(self._file(ObjectRef.of(manifest)), json.dumps(manifest, indent=2) + "\n")


def _recorded_processes(pod: Manifest) -> Iterable[ProcessId]:
    recorded: list[Any] = json.loads(pod["metadata"].get("annotations", {}).get(_PROCESS, "[]"))
    return [ProcessId(pid=pid, start_ticks=ticks) for pid, ticks in recorded]


def _free_port() -> int:
    """Return a port that is free now: the gang binds it some seconds later."""
    with socket.socket() as probe:
        probe.bind((_ADDRESS, 0))
        return int(probe.getsockname()[1])
