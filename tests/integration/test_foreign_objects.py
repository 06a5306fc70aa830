"""An object of a child's name that somebody made in the moment before the operator's own request is left alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from posttrain.plan import labels
from tests.cluster.cluster import TestCluster
from tests.support.api_proxy import ApiProxy, ApiRequest
from tests.support.cluster_runs import ClusterRun, reasons
from tests.support.operator_process import Replicas

pytestmark = pytest.mark.integration

WAIT_SECONDS = 60.0
AS_A_CHILD = {labels.RUN: "demo", labels.MANAGED_BY: labels.MANAGER}
CLAIM_SPEC = {
    "accessModes": ["ReadWriteMany"],
    "storageClassName": "",
    "resources": {"requests": {"storage": "3Gi"}},
}


@pytest.mark.parametrize(
    ("resource", "foreign"),
    [
        ("configmaps", {"kind": "ConfigMap", "metadata": {"name": "demo-a1"}, "data": {"mine": "yes"}}),
        (
            "configmaps",
            {"kind": "ConfigMap", "metadata": {"name": "demo-a1", "labels": AS_A_CHILD}, "data": {"mine": "yes"}},
        ),
        (
            "persistentvolumeclaims",
            {"kind": "PersistentVolumeClaim", "metadata": {"name": "demo"}, "spec": CLAIM_SPEC},
        ),
    ],
    ids=["config-map", "config-map-labelled-as-a-child", "claim"],
)
def test_a_foreign_object_made_between_observing_and_creating_survives_byte_for_byte(
    faulty_cluster: TestCluster,
    faulty_namespace: str,
    proxy: ApiProxy,
    replicas: Replicas,
    resource: str,
    foreign: Mapping[str, Any],
) -> None:
    name = foreign["metadata"]["name"]

    def creates_it(asked: ApiRequest) -> bool:
        return (asked.method, asked.resource, asked.name) == ("POST", resource, name)

    def read() -> Any:
        return faulty_cluster.get(resource, name, "--namespace", faulty_namespace, "--show-managed-fields")

    held = proxy.hold(creates_it)
    replicas.add("operator", kubeconfig=proxy.kubeconfig)
    run = ClusterRun(faulty_cluster, faulty_namespace)
    run.apply(checkpoints={"storage": {"size": "1Gi"}})
    assert held.arrived.wait(WAIT_SECONDS), f"the operator never creates {resource}/{name}"
    faulty_cluster.apply([{"apiVersion": "v1", **foreign}], namespace=faulty_namespace)
    before = read()
    held.release()

    ended = run.await_status(lambda s: "NameConflict" in {reason for _, reason in reasons(s).values()}, what="conflict")
    assert any(name in condition["message"] for condition in ended["conditions"])
    run.kubectl("delete", "trainingrun", run.name)
    faulty_cluster.await_json(
        *("serviceaccounts,networkpolicies,pytorchjobs", "--namespace", faulty_namespace),
        *("--selector", f"{labels.RUN}={run.name}"),
        until=lambda found: not found["items"],
        what="the garbage collector",
    )
    assert read() == before
