"""`LocalCluster`: the objects of one run's plan, executed on this machine.

It owns the objects and the controllers that make pods of them, for exactly the kinds that a plan uses; it must not
decide what ought to be there, nor know what a pod is on this machine, which is the kubelet's.

Everything happens in the thread that calls it.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path

from posttrain.api.training_run_status import TrainingRunStatus
from posttrain.local.jobs import Outcome, Rendezvous, reconcile_job, reconcile_pytorchjob
from posttrain.local.kubelet import Kubelet, Tokens
from posttrain.local.network import LOOPBACK, free_port
from posttrain.local.pod_process import Site
from posttrain.local.pods import is_owned_by, new_metadata
from posttrain.local.services import reconcile_service
from posttrain.local.state import RunFolder, write_atomically
from posttrain.local.store import RunStore
from posttrain.plan.types import Manifest, ObjectRef, Observed

KINDS = frozenset(
    {
        ("v1", "ServiceAccount"),
        ("v1", "PersistentVolumeClaim"),
        ("v1", "ConfigMap"),
        ("v1", "Secret"),
        ("v1", "Service"),
        ("apps/v1", "Deployment"),
        ("apps/v1", "StatefulSet"),
        ("networking.k8s.io/v1", "NetworkPolicy"),
        ("batch/v1", "Job"),
        ("kubeflow.org/v1", "PyTorchJob"),
    }
)


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
        self._config_maps = config_maps
        self._runs = runs
        self._notify = notify
        self._clock = clock
        self._retry_at: datetime | None = None
        for part in (folder.objects, folder.pods, folder.volumes, folder.logs):
            part.mkdir(parents=True, exist_ok=True)
        self._objects = self._load()
        self._kubelet = Kubelet(
            folder, site=site, claims=claims, objects=self, tokens=tokens, notify=notify, clock=clock
        )
        self._kubelet.bury_lost(owners=[manifest["metadata"]["uid"] for manifest in self._objects.values()])

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
        for pod in self._pods_of(manifest):
            self._kubelet.delete(pod["metadata"]["name"])
        self._notify()

    def get(self, ref: ObjectRef) -> Manifest | None:
        """Return an object with its status, or None."""
        if ref.kind == "Pod":
            return self._kubelet.get(ref.name)
        return self._objects.get(ref)

    def list(self, kind: str) -> list[Manifest]:
        """Return every object of a kind, by name."""
        if kind == "Pod":
            return self._kubelet.pods
        found = [manifest for manifest in self._objects.values() if manifest["kind"] == kind]
        return sorted(found, key=lambda manifest: str(manifest["metadata"]["name"]))

    def observe(self) -> Observed:
        """Take up what has happened, let the controllers react to it, and return the facts that a plan needs."""
        self._kubelet.take_up_news()
        self._run_controllers()
        return Observed(
            objects=dict(self._objects),
            pods=tuple(self.list("Pod")),
            config_maps=self._config_maps,
            runs=self._runs,
            server_key=secrets.token_urlsafe(32),
        )

    # --- The executor ------------------------------------------------------------------------------------------------

    @property
    def retry_at(self) -> datetime | None:
        """When a pod or a container will be started again without anything else happening."""
        return self._retry_at

    @property
    def has_live_pods(self) -> bool:
        """Whether a container runs that ends by itself; what has just ended counts until the next `observe`."""
        return self._kubelet.has_live_pods

    def kill(self) -> None:
        """End every container at once, and every later one without a grace period."""
        self._kubelet.kill()

    def close(self) -> None:
        """End every container: nothing goes on when this process goes."""
        self._kubelet.close()

    def _run_controllers(self) -> None:
        now = self._clock()
        retries = []
        for ref, owner in list(self._objects.items()):
            outcome = self._reconcile(ref, owner, now=now)
            if outcome is None:
                continue
            for manifest in outcome.create:
                self._kubelet.start(manifest)
            for name in outcome.delete:
                self._kubelet.delete(name)
            retries.append(outcome.retry_at)
            if outcome.status != owner.get("status"):
                self._write({**owner, "status": outcome.status})
                self._notify()
        retries.append(self._kubelet.restart())
        self._retry_at = min((time for time in retries if time is not None), default=None)

    def _reconcile(self, ref: ObjectRef, owner: Manifest, *, now: datetime) -> Outcome | None:
        match ref.kind:
            case "PyTorchJob":
                rendezvous = Rendezvous(address=LOOPBACK, port=0 if owner.get("status") else free_port())
                return reconcile_pytorchjob(owner, self._pods_of(owner), rendezvous=rendezvous, now=now)
            case "Job":
                return reconcile_job(owner, self._pods_of(owner), now=now)
            case "Deployment" | "StatefulSet":
                return reconcile_service(owner, self._pods_of(owner), now=now)
        return None

    def _pods_of(self, owner: Manifest) -> tuple[Manifest, ...]:
        return tuple(pod for pod in self._kubelet.pods if is_owned_by(pod, owner))

    # --- Files -------------------------------------------------------------------------------------------------------

    def _load(self) -> dict[ObjectRef, Manifest]:
        loaded = (json.loads(file.read_text()) for file in sorted(self._folder.objects.glob("*.json")))
        return {ObjectRef.of(manifest): manifest for manifest in loaded if manifest["kind"] != "Pod"}

    def _file(self, ref: ObjectRef) -> Path:
        return self._folder.object_file(ref.kind, ref.name)

    def _write(self, manifest: Manifest) -> None:
        ref = ObjectRef.of(manifest)
        self._objects[ref] = manifest
        text = json.dumps(manifest, indent=2) + "\n"
        write_atomically(self._file(ref), text, private=ref.kind == "Secret")
