"""A cluster that somebody else started, used by its kubeconfig.

It owns what the tests bring there and take away again; it must not change anything that it has not made.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import yaml

from tests.cluster.access import Access, read_access
from tests.cluster.any_cluster import Cluster, to_list
from tests.cluster.errors import ClusterError
from tests.cluster.kwok import OURS, PREFIX, build_kwok
from tests.support.jobs import build_pytorchjob

GUEST = f"{PREFIX}/guest"
"""Label of everything that is made here and lies in no namespace, with the value of who made it."""
RUNS = "trainingruns.posttrain.dev"
JOBS = "pytorchjobs.kubeflow.org"
CLEAN_UP = (
    "kubectl delete namespace,node,persistentvolume,clusterrole,clusterrolebinding,customresourcedefinition "
    f"--selector {GUEST}"
)
"""Takes away what a process left that was killed."""
_UNINSTALL = "uninstall posttrain there, or take another cluster"
_OPERATOR_SECONDS = 30.0
_DELETE = ("--wait", "--timeout=100s", f"--selector={GUEST}={OURS}")


class NotUsableError(ClusterError):
    """The cluster lacks what the tests need, or has what they would bring."""


class ExternalCluster(Cluster):
    """Somebody's cluster, with nodes of our own that a KWOK of this process plays.

    Namespaces, and every object that is in none, bear a label, and go at the end.
    """

    def __init__(self, folder: Path, access: Access) -> None:
        super().__init__(folder)
        self.access = access
        self._namespaces: set[str] = set()
        self._kinds = {"nodes"}

    @classmethod
    def join(cls, folder: Path, *, kubeconfig: Path) -> Self:
        """Begin to use the cluster of a kubeconfig's current context; what is needed to do so lies in a folder.

        Raises:
            NotUsableError: it has no training operator, or posttrain is there already.
            ClusterError: there is no such file, nobody answers, or KWOK did not start.
        """
        if not kubeconfig.is_file():
            raise ClusterError(f"there is no kubeconfig {kubeconfig}")
        cluster = cls(folder, read_access(kubeconfig, folder=folder))
        try:
            cluster._join()
        except BaseException:
            cluster.close()
            raise
        return cluster

    def create_namespace(self, name: str) -> None:
        """Make a namespace, and wait until it takes pods; it must not be there yet. Errors as `kubectl`."""
        metadata = {"name": name, "labels": {GUEST: OURS}}
        namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": metadata}
        self.kubectl("create", "--filename", "-", input=json.dumps(namespace))
        self._namespaces.add(name)
        self.access.await_namespace(name)

    def apply(self, objects: str | Iterable[Mapping[str, Any]], *, namespace: str | None = None) -> None:
        """Apply YAML text or objects on the server's side, in namespaces that were made here.

        Raises:
            ClusterError: kubectl failed, or an object is not these tests' to change.
        """
        manifests = list(yaml.load_all(objects, Loader=yaml.CSafeLoader) if isinstance(objects, str) else objects)
        narrow = [manifest for manifest in manifests if self._is_in_our_namespace(manifest, namespace)]
        wide = [_marked(manifest) for manifest in manifests if manifest not in narrow]
        self._check_made_here(wide)
        self._kinds.update(map(_kind_of, wide))
        super().apply([*wide, *narrow], namespace=namespace)

    def _join(self) -> None:
        found = self.get("customresourcedefinitions")["items"]
        labels = {item["metadata"]["name"]: item["metadata"].get("labels", {}) for item in found}
        if JOBS not in labels:
            raise NotUsableError(f"it has no training operator: there is no resource {JOBS}")
        if RUNS in labels:
            raise NotUsableError(
                f"it serves {RUNS}, and the tests' operator would act on runs that are not its own: "
                + (f"other tests use it, or were killed; then `{CLEAN_UP}`" if GUEST in labels[RUNS] else _UNINSTALL)
            )
        kwok = build_kwok(self.folder, kubeconfig=self.kubeconfig, env=os.environ)
        self._processes.append(kwok)
        self._exit.callback(kwok.stop)
        self._exit.callback(self._take_away)
        kwok.start()
        self._await_training_operator()

    def _await_training_operator(self) -> None:
        namespace = f"test-{OURS}"
        self.create_namespace(namespace)
        try:
            self.apply([build_pytorchjob("probe")], namespace=namespace)
            self.await_json(
                *("pytorchjob", "probe", "--namespace", namespace),
                until=lambda job: job.get("status", {}).get("conditions"),
                what="the first condition of a PyTorchJob",
                seconds=_OPERATOR_SECONDS,
            )
        except ClusterError as error:
            raise NotUsableError(f"its training operator does nothing: {error}") from error
        self.kubectl("delete", "namespace", namespace, "--wait=false")

    def _is_in_our_namespace(self, manifest: Mapping[str, Any], default: str | None) -> bool:
        namespace = manifest["metadata"].get("namespace", default)
        if namespace is not None and namespace not in self._namespaces:
            raise ClusterError(
                f"{manifest['kind']} {manifest['metadata']['name']} is for the namespace {namespace}, "
                "which was not made by these tests"
            )
        return namespace is not None

    def _check_made_here(self, objects: Sequence[Mapping[str, Any]]) -> None:
        if not objects:
            return
        found = self.kubectl("get", "--ignore-not-found", "--output=json", "--filename=-", input=to_list(objects))
        standing = json.loads(found or '{"items": []}')
        for item in standing.get("items", [standing]):
            if item["metadata"].get("labels", {}).get(GUEST) != OURS:
                name = f"{item['kind']} {item['metadata']['name']}"
                raise ClusterError(f"{name} is there already, and these tests have not made it: it stays as it is")

    def _take_away(self) -> None:
        # First what is in namespaces: it may need a node that is played, or the definition of its kind, for its end.
        self.kubectl("delete", "namespaces", *_DELETE)
        self.kubectl("delete", ",".join(sorted(self._kinds)), *_DELETE)


def _kind_of(manifest: Mapping[str, Any]) -> str:
    group, _, version = str(manifest["apiVersion"]).rpartition("/")
    return f"{manifest['kind']}.{version}.{group}" if group else str(manifest["kind"])


def _marked(manifest: Mapping[str, Any]) -> Mapping[str, Any]:
    metadata = manifest["metadata"]
    return {**manifest, "metadata": {**metadata, "labels": {**metadata.get("labels", {}), GUEST: OURS}}}
