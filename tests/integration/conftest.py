"""A real control plane with nodes that are played, shared by the session, and a namespace a test."""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from tests.cluster.cluster import TestCluster
from tests.support.cluster_runs import ClusterRun
from tests.support.operator_process import NAMESPACE, OperatorProcess, add_claim
from tests.support.tiers import attach_cluster_logs, fresh_namespace, require

CRD = Path(__file__).parents[2] / "crds" / "posttrain.dev_trainingruns.yaml"


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestCluster]:
    """A control plane, the training operator, KWOK and four nodes with eight GPUs each."""
    require("control-plane")
    with TestCluster.start(tmp_path_factory.mktemp("cluster")) as started:
        started.add_fake_nodes(4)
        yield started


@pytest.fixture(scope="session")
def kueue_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestCluster]:
    """Another cluster, with Kueue in it, which makes no queue."""
    require("control-plane", "kueue")
    with TestCluster.start(tmp_path_factory.mktemp("kueue"), kueue=True) as started:
        started.add_fake_nodes(4)
        yield started


@pytest.fixture
def namespace(cluster: TestCluster) -> Iterator[str]:
    """A namespace of the test's own."""
    with fresh_namespace(cluster) as name:
        yield name


@pytest.fixture
def kueue_namespace(kueue_cluster: TestCluster) -> Iterator[str]:
    """A namespace of the test's own in the cluster with Kueue."""
    with fresh_namespace(kueue_cluster) as name:
        yield name


def serve_runs(cluster: TestCluster) -> None:
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
def operator(cluster: TestCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OperatorProcess]:
    """The operator, which leads."""
    serve_runs(cluster)
    cluster.create_namespace(NAMESPACE)
    operator = OperatorProcess(cluster, tmp_path_factory.mktemp("operator"), python=Path(sys.executable))
    try:
        operator.process.start()
        yield operator
    finally:
        operator.close()


@pytest.fixture
def run(cluster: TestCluster, operator: OperatorProcess, namespace: str) -> ClusterRun:
    """A run that is not applied yet, in a namespace with the claims that it names."""
    for claim in ("inputs", "shared"):
        add_claim(cluster, namespace, claim)
    return ClusterRun(cluster, namespace)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        attach_cluster_logs(item, report)
    return report
