"""What other controllers and the kubelet would write about a run's children, on request.

It owns what the training operator, the Job controller, the kubelet and the progress server do to a `FakeCluster`; it
must not do any of it by itself. A pod keeps a finalizer until the kubelet is done with it, as a real one keeps its
object until its containers have ended.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from datetime import datetime, timedelta
from typing import Any

from posttrain.api.conditions import QUOTA_RESERVED
from posttrain.api.training_run import MUTABLE_RESOURCES_FIELDS
from posttrain.api.training_run_status import Progress
from posttrain.contract.facts import FactBody, FactsReport
from posttrain.contract.result import Result
from posttrain.control.kinds import DEPLOYMENT, EVENT, JOB, POD, PYTORCHJOB, STATEFUL_SET, TRAINING_RUN, Kind
from posttrain.control.port import ObjectKey
from posttrain.plan import labels
from posttrain.plan.manifests import is_being_deleted, pod_phase
from posttrain.plan.progress import next_progress
from posttrain.plan.types import Manifest
from tests.support.builders import build_report, end_pod, ended_status, rfc3339
from tests.support.fake_cluster import FakeCluster

_KUBELET = "test/kubelet"
_LIVE = ("Pending", "Running")
_QUOTA_HELD = (QUOTA_RESERVED, "True")


class RefusedEdit(Exception):
    """The API server does not take a change of the spec."""


class Controllers:
    """Plays them for one run."""

    def __init__(self, cluster: FakeCluster, *, clock: Callable[[], datetime], namespace: str, run: str) -> None:
        self._cluster = cluster
        self._clock = clock
        self._namespace = namespace
        self._run = run
        self._seqs: dict[tuple[str, int, str], int] = {}

    def key(self, kind: Kind, name: str) -> ObjectKey:
        """Return the key of an object in the run's namespace."""
        return ObjectKey(*kind, self._namespace, name)

    def find(self, kind: Kind, name: str) -> Manifest | None:
        """Return an object, or None."""
        found = (item for item in self._cluster.objects(kind) if item["metadata"]["namespace"] == self._namespace)
        return next((item for item in found if item["metadata"]["name"] == name), None)

    # --- The training operator and the Job controller ----------------------------------------------------------------

    def job(self, attempt: int) -> Manifest | None:
        """Return an attempt's PyTorchJob."""
        return self.find(PYTORCHJOB, f"{self._run}-a{attempt}")

    def jobs(self) -> list[Manifest]:
        """Return every PyTorchJob."""
        return self._cluster.objects(PYTORCHJOB)

    def job_runs(self, attempt: int) -> bool:
        """Return whether an attempt's job is there and has not ended."""
        job = self.job(attempt)
        return job is not None and not job.get("status") and not is_being_deleted(job)

    def make_pods(self) -> list[str]:
        """Make the pods that jobs want and that are not there; return their names."""
        made = []
        for job in self.jobs():
            if job.get("status") or is_being_deleted(job):
                continue
            for role, replicas in job["spec"]["pytorchReplicaSpecs"].items():
                for index in range(replicas["replicas"]):
                    name = f"{job['metadata']['name']}-{role.lower()}-{index}"
                    if self.find(POD, name) is None:
                        self._make_pod(name, job, replicas["template"])
                        made.append(name)
        return made

    def make_server_pods(self) -> list[str]:
        """Make the pods of the rollout servers that are wanted and not there; return their names."""
        servers = self.find(STATEFUL_SET, f"{self._run}-server")
        assert servers is not None, "the servers are wanted"
        wanted = [f"{servers['metadata']['name']}-{index}" for index in range(servers["spec"]["replicas"])]
        made = [name for name in wanted if self.find(POD, name) is None]
        for name in made:
            self._make_pod(name, servers, servers["spec"]["template"])
        return made

    def make_prepare_pod(self) -> str:
        """Make the pod of prepare's Job; return its name."""
        job = self.find(JOB, f"{self._run}-prepare")
        assert job is not None, "prepare's Job is there"
        name = f"{job['metadata']['name']}-x7k2p"
        if self.find(POD, name) is None:
            self._make_pod(name, job, job["spec"]["template"])
        return name

    def make_sandbox_pod(self, **status: Any) -> None:
        """Make the pod of the sandbox's Deployment, with this status."""
        deployment = self.find(DEPLOYMENT, f"{self._run}-sandbox")
        assert deployment is not None, "the sandbox's Deployment is there"
        name = f"{self._run}-sandbox-6d9f7-x2x9z"
        self._make_pod(name, deployment, deployment["spec"]["template"])
        self.set_pod_status(name, **status)

    def _make_pod(self, name: str, job: Manifest, template: Manifest) -> None:
        owner = {part: job[part] for part in ("apiVersion", "kind")}
        owner |= {"name": job["metadata"]["name"], "uid": job["metadata"]["uid"], "controller": True}
        metadata = {
            "name": name,
            "namespace": self._namespace,
            "labels": deepcopy(template["metadata"]["labels"]),
            "ownerReferences": [owner],
            "finalizers": [_KUBELET],
        }
        spec = {"containers": [{"name": c["name"]} for c in template["spec"]["containers"]]}
        status = {"phase": "Pending"}
        self._cluster.put({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec, "status": status})

    def end_job(self, attempt: int, type_: str) -> None:
        """Say that an attempt's job succeeded or failed; pods that still run are deleted (cleanPodPolicy)."""
        key = self.key(PYTORCHJOB, f"{self._run}-a{attempt}")
        self._cluster.put_status(key, ended_status(type_, at_time=self._clock()))
        for pod in self.pods(attempt):
            if pod_phase(pod) in _LIVE:
                self.delete(POD, pod["metadata"]["name"])

    def end_prepare(self, type_: str = "Complete", *, message: str = "") -> None:
        """Say that prepare's Job is complete or failed."""
        key = self.key(JOB, f"{self._run}-prepare")
        self._cluster.put_status(key, ended_status(type_, at_time=self._clock(), message=message))

    # --- The kubelet -------------------------------------------------------------------------------------------------

    def pods(self, attempt: int | None = None) -> list[Manifest]:
        """Return the trainers' pods, of one attempt or of all."""
        found = []
        for pod in self._cluster.objects(POD):
            own = pod["metadata"]["labels"]
            wanted = attempt is None or own.get(labels.ATTEMPT) == str(attempt)
            if own.get(labels.ROLE) == labels.ROLE_TRAINER and wanted:
                found.append(pod)
        return found

    def bind_pod(self, name: str, *, set_up: bool = False) -> None:
        """Let a waiting pod be bound to a node, as its kubelet shows it until its containers are created.

        `set_up`: volumes and network are there; what is missing is an image.
        """
        pod = self.find(POD, name)
        assert pod is not None, f"pod {name} is there"
        now = rfc3339(self._clock())
        creating = {"waiting": {"reason": "ContainerCreating"}}
        status = {
            **pod["status"],
            "startTime": now,
            "conditions": [
                {"type": "PodReadyToStartContainers", "status": str(set_up), "lastTransitionTime": now},
                {"type": "PodScheduled", "status": "True", "lastTransitionTime": now},
            ],
            "containerStatuses": [
                {"name": container["name"], "ready": False, "state": creating}
                for container in pod["spec"]["containers"]
            ],
        }
        self._cluster.put({**pod, "spec": {**pod["spec"], "nodeName": "node-0"}, "status": status})

    def run_pods(self, attempt: int) -> None:
        """Let every waiting pod of an attempt run."""
        for node, pod in enumerate(self.pods(attempt)):
            if pod_phase(pod) == "Pending" and not is_being_deleted(pod):
                status = {"phase": "Running", "startTime": rfc3339(self._clock())}
                self._cluster.put({**pod, "spec": {**pod["spec"], "nodeName": f"node-{node}"}, "status": status})

    def silence(self, name: str, *, answers: bool = False, container: str = "pytorch") -> None:
        """Let a running pod's kubelet tell nothing any more, as the node controller shows it, or answer again."""
        ready = {"type": "Ready", "status": "True" if answers else "False"}
        self.set_pod_status(name, conditions=[ready], containerStatuses=[{"name": container, "ready": True}])

    def give_up(self, name: str) -> None:
        """Ask for the deletion of a pod whose kubelet does not answer, as the cluster does after a while."""
        pod = self.find(POD, name)
        assert pod is not None, f"pod {name} is there"
        deleted = {"deletionTimestamp": rfc3339(self._clock()), "deletionGracePeriodSeconds": 30}
        self._cluster.put({**pod, "metadata": {**pod["metadata"], **deleted}})

    def set_pod_status(self, name: str, **status: Any) -> None:
        """Change parts of a pod's status."""
        pod = self.find(POD, name)
        assert pod is not None, f"pod {name} is there"
        self._cluster.put({**pod, "status": {**pod["status"], **status}})

    def end_pod(
        self, name: str, *, exit_code: int, result: Result | None = None, terminated_reason: str | None = None
    ) -> None:
        """Let a pod's container end."""
        pod = self.find(POD, name)
        assert pod is not None, f"pod {name} is there"
        self._cluster.put(
            end_pod(
                pod,
                exit_code=exit_code,
                finished=self._clock(),
                result=result,
                terminated_reason=terminated_reason,
            )
        )

    def finish_deletions(self) -> int:
        """Let every pod end that is being deleted; return how many there were."""
        going = [pod for pod in self._cluster.objects(POD) if is_being_deleted(pod)]
        for pod in going:
            self._cluster.put({**pod, "metadata": {**pod["metadata"], "finalizers": []}})
        return len(going)

    def remove_pod(self, name: str) -> None:
        """Let a pod vanish at once, as by `kubectl delete --force`."""
        self.delete(POD, name)
        self.finish_deletions()

    def fail_gang(self, attempt: int, *, exit_code: int, node: int = 0, result: Result | None = None) -> None:
        """Let one pod of a running gang fail, and its job after it."""
        name = self.pods(attempt)[node]["metadata"]["name"]
        self.end_pod(name, exit_code=exit_code, result=result)
        self.end_job(attempt, "Failed")

    def complete_gang(self, attempt: int, *, result: Result | None = None) -> None:
        """Let a running gang end well."""
        for pod in self.pods(attempt):
            self.end_pod(pod["metadata"]["name"], exit_code=0, result=result)
        self.end_job(attempt, "Succeeded")

    # --- People ------------------------------------------------------------------------------------------------------

    def copy_pod(self, name: str, *, to: str) -> None:
        """Make a copy of a pod to look into, as by `kubectl debug --copy-to --keep-labels`: nobody owns it."""
        pod = self.find(POD, name)
        assert pod is not None, f"pod {name} is there"
        metadata = {"name": to, "namespace": self._namespace, "labels": deepcopy(pod["metadata"]["labels"])}
        copy = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": pod["spec"]}
        self._cluster.put({**copy, "status": {"phase": "Pending"}})

    def put_event(self, kind: Kind, name: str, *, reason: str, message: str) -> None:
        """Let its controller, or a pod's kubelet, say something about an object."""
        about = self.find(kind, name)
        assert about is not None, f"{name} is there"
        self._cluster.put(
            {
                "apiVersion": EVENT[0],
                "kind": EVENT[1],
                "metadata": {"name": f"{name}.{reason.lower()}", "namespace": self._namespace},
                "involvedObject": {"kind": kind[1], "name": name, "uid": about["metadata"]["uid"]},
                "type": "Warning",
                "reason": reason,
                "message": message,
                "lastTimestamp": rfc3339(self._clock()),
            }
        )

    def delete(self, kind: Kind, name: str) -> None:
        """Delete an object, and with it what it owns."""
        self._cluster.remove(self.key(kind, name))

    def change_run(self, **spec: Any) -> Manifest:
        """Change fields of the run's spec.

        Raises:
            RefusedEdit: the API server refuses it, as the run holds its quota.
        """
        run = self.find(TRAINING_RUN, self._run)
        assert run is not None, "the run is there"
        before, after = run["spec"].get("resources") or {}, spec.get("resources") or {}
        changed = [name for name in MUTABLE_RESOURCES_FIELDS if before.get(name) != after.get(name)]
        said = (run.get("status") or {}).get("conditions") or ()
        if "resources" in spec and changed and any((c["type"], c["status"]) == _QUOTA_HELD for c in said):
            raise RefusedEdit(f"resources.{changed[0]} can change only while the run holds no quota")
        return self._cluster.put({**run, "spec": {**run["spec"], **spec}})

    # --- The progress server -----------------------------------------------------------------------------------------

    def tell(self, *facts: FactBody, attempt: int, source: str = "rank-0", **beat: Any) -> None:
        """Write what a workload reports into `status.progress`."""
        run = self.find(TRAINING_RUN, self._run)
        assert run is not None, "the run is there"
        sender = (run["metadata"]["uid"], attempt, source)
        first = self._seqs.get(sender, 0) + 1
        self._seqs[sender] = first + len(facts) - 1
        self.take(build_report(*facts, attempt=attempt, source=source, first_seq=first, **beat))

    def take(self, report: FactsReport, *, seconds_ago: float = 0) -> None:
        """Write a report into `status.progress`."""
        run = self.find(TRAINING_RUN, self._run)
        assert run is not None, "the run is there"
        known = (run.get("status") or {}).get("progress")
        progress = next_progress(
            Progress.model_validate(known) if known else None,
            report,
            received_at=self._clock() - timedelta(seconds=seconds_ago),
        )
        data = progress.model_dump(mode="json", by_alias=True, exclude_none=True)
        self._cluster.put({**run, "status": {**(run.get("status") or {}), "progress": data}})
