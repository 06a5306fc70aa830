"""A real control plane with nodes that are played, shared by the session, and a namespace a test."""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from tests.cluster.any_cluster import Cluster
from tests.cluster.cluster import TestCluster
from tests.support.api_proxy import ApiProxy
from tests.support.chart_rights import read_rights
from tests.support.cluster_runs import ClusterRun
from tests.support.operator_process import NAMESPACE, OperatorProcess, Replicas, add_claim
from tests.support.tiers import (
    attach_cluster_logs,
    external_kubeconfig,
    fresh_namespace,
    join_external,
    require,
    require_own_cluster,
)

CRD = Path(__file__).parents[2] / "crds" / "posttrain.dev_trainingruns.yaml"


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A control plane, the training operator, KWOK and four nodes with eight GPUs each; or $POSTTRAIN_KUBECONFIG's."""
    require("control-plane")
    folder, kubeconfig = tmp_path_factory.mktemp("cluster"), external_kubeconfig()
    with join_external(kubeconfig, folder) if kubeconfig else TestCluster.start(folder) as cluster:
        cluster.add_fake_nodes(4)
        yield cluster


@pytest.fixture(scope="session")
def own_cluster(cluster: Cluster) -> TestCluster:
    """The same, of which a test may read the audit log, and stop what it is made of."""
    require_own_cluster("control-plane", why="its audit log and its processes are not theirs")
    assert isinstance(cluster, TestCluster)
    return cluster


@pytest.fixture(scope="session")
def kueue_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestCluster]:
    """Another cluster, with Kueue in it, which makes no queue."""
    require_own_cluster("kueue", why="they bring a Kueue with a configuration of their own")
    require("control-plane", "kueue")
    with TestCluster.start(tmp_path_factory.mktemp("kueue"), kueue=True) as started:
        started.add_fake_nodes(4)
        yield started


@pytest.fixture
def namespace(cluster: Cluster) -> Iterator[str]:
    """A namespace of the test's own."""
    with fresh_namespace(cluster) as name:
        yield name


@pytest.fixture
def kueue_namespace(kueue_cluster: TestCluster) -> Iterator[str]:
    """A namespace of the test's own in the cluster with Kueue."""
    with fresh_namespace(kueue_cluster) as name:
        yield name


def serve_runs(cluster: Cluster) -> None:
    """Let the API server serve the resource, and wait until it does."""
    cluster.apply(CRD.read_text())
    cluster.await_json(
        *("crd", "trainingruns.posttrain.dev"),
        until=lambda crd: any(
            (condition["type"], condition["status"]) == ("Established", "True")
            for condition in crd.get("status", {}).get("conditions") or ()
        ),
        what="the resource to be served",
    )


@pytest.fixture(scope="session")
def operator(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OperatorProcess]:
    """The operator, which leads; it may do what the chart allows it, and asks for nothing else."""
    serve_runs(cluster)
    cluster.create_namespace(NAMESPACE)
    cluster.apply(read_rights(namespace=NAMESPACE))
    operator = OperatorProcess(
        cluster,
        tmp_path_factory.mktemp("operator"),
        python=Path(sys.executable),
        kubeconfig=cluster.service_account_kubeconfig(NAMESPACE, "posttrain-operator"),
    )
    try:
        operator.process.start()
        yield operator
    finally:
        operator.close()
    if not isinstance(cluster, TestCluster):
        return  # only a cluster of our own tells what it refused
    user = f"system:serviceaccount:{NAMESPACE}:posttrain-operator"
    asked = [event for event in cluster.audit() if event["user"].get("username") == user]
    decided: dict[str, set[str]] = {"allow": set(), "forbid": set()}
    for event in asked:
        about = event.get("objectRef") or {}
        named = (event["verb"], *(about.get(part, "") for part in ("apiGroup", "resource", "subresource")))
        decided[event["annotations"]["authorization.k8s.io/decision"]].add(" ".join(named))
    assert decided["allow"]
    # A server that a test has just started again refuses everything until it has read the roles.
    missing = decided["forbid"] - decided["allow"]
    assert not missing, "charts/posttrain/templates/rbac.yaml does not grant what the operator asked for"


@pytest.fixture
def run(cluster: Cluster, operator: OperatorProcess, namespace: str) -> ClusterRun:
    """A run that is not applied yet, in a namespace with the claims that it names."""
    for claim in ("inputs", "shared"):
        add_claim(cluster, namespace, claim)
    return ClusterRun(cluster, namespace)


@pytest.fixture(scope="session")
def faulty_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestCluster]:
    """Another cluster, in which tests start operators of their own, stop them, and take the API server away."""
    require_own_cluster("control-plane", why="they do not make its API server fail, nor read its audit log")
    require("control-plane")
    with TestCluster.start(tmp_path_factory.mktemp("faulty")) as started:
        started.add_fake_nodes(8)
        started.apply(CRD.read_text())
        started.create_namespace(NAMESPACE)
        yield started


@pytest.fixture
def proxy(faulty_cluster: TestCluster) -> Iterator[ApiProxy]:
    """A way to the API server of the cluster for faults, at which things go wrong."""
    with ApiProxy(faulty_cluster) as proxy:
        yield proxy


@pytest.fixture
def faulty_namespace(faulty_cluster: TestCluster) -> Iterator[str]:
    """A namespace in the cluster for faults, with the claims that runs name."""
    with fresh_namespace(faulty_cluster) as name:
        for claim in ("inputs", "shared"):
            add_claim(faulty_cluster, name, claim)
        yield name


@pytest.fixture
def replicas(faulty_cluster: TestCluster, tmp_path: Path) -> Iterator[Replicas]:
    """The operators of one test in the cluster for faults; none runs yet."""
    replicas = Replicas(faulty_cluster, tmp_path)
    try:
        yield replicas
    finally:
        replicas.close()
        # The next test's operator has not to wait until this one's lease is over.
        faulty_cluster.kubectl("delete", "lease", "--all", "--namespace", NAMESPACE)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        attach_cluster_logs(item, report)
    return report
