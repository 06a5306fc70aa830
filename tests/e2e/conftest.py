"""A cluster with a real node, shared by the session, and a namespace a test."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any

import pytest

from tests.cluster.cluster import TestCluster
from tests.support.host import observe_host
from tests.support.tiers import attach_cluster_logs, fresh_namespace, require


@pytest.fixture(scope="session")
def host_before() -> dict[str, Any]:
    """This host before the node was started."""
    require("control-plane", "node")
    return observe_host()


@pytest.fixture(scope="session")
def node_cluster(host_before: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestCluster]:
    """A control plane, the training operator, KWOK and the real node `node-1`."""
    with TestCluster.start(tmp_path_factory.mktemp("node"), node=True) as started:
        yield started


@pytest.fixture
def node_namespace(node_cluster: TestCluster) -> Iterator[str]:
    """A namespace of the test's own."""
    with fresh_namespace(node_cluster) as name:
        yield name


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        attach_cluster_logs(item, report)
    return report
