"""A real control plane with nodes that are played, shared by the session, and a namespace a test."""

from __future__ import annotations

import uuid
from collections.abc import Generator, Iterator

import pytest

from tests.cluster.cluster import TestCluster
from tests.support.tiers import attach_cluster_logs, require


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestCluster]:
    """A control plane, the training operator, KWOK and four nodes with eight GPUs each."""
    require("control-plane")
    with TestCluster.start(tmp_path_factory.mktemp("cluster")) as started:
        started.add_fake_nodes(4)
        yield started


@pytest.fixture
def namespace(cluster: TestCluster) -> Iterator[str]:
    """A namespace of the test's own."""
    name = f"test-{uuid.uuid4().hex[:8]}"
    cluster.create_namespace(name)
    yield name
    cluster.kubectl("delete", "namespace", name, "--wait=false")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        attach_cluster_logs(item, report)
    return report
