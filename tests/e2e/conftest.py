"""A cluster with a real node, shared by the session, a namespace a test, and posttrain installed from its chart."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any

import pytest

from tests.cluster.cluster import TestCluster
from tests.support.host import observe_host
from tests.support.release import Release, start_node
from tests.support.tiers import attach_cluster_logs, fresh_namespace, require, require_own_cluster
from tests.workloads.conftest import quickstart_inputs, quickstart_model, rows, tiny_model, trainer_python

__all__ = ["quickstart_inputs", "quickstart_model", "rows", "tiny_model", "trainer_python"]


@pytest.fixture(scope="session")
def host_before() -> dict[str, Any]:
    """This host before the node was started."""
    require_own_cluster("node", why="they do not load the images of operator and trainer onto its nodes")
    require("control-plane", "node")
    return observe_host()


@pytest.fixture(scope="session")
def node_cluster(host_before: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestCluster]:
    """A control plane, the training operator, KWOK and the real node `node-1`, which has the trainer's libraries."""
    with start_node(tmp_path_factory.mktemp("node")) as started:
        yield started


@pytest.fixture
def node_namespace(node_cluster: TestCluster) -> Iterator[str]:
    """A namespace of the test's own."""
    with fresh_namespace(node_cluster) as name:
        yield name


@pytest.fixture(scope="session")
def release(node_cluster: TestCluster) -> Release:
    """posttrain, installed by helm on the real node, its operator a pod of its own image."""
    return Release.install(node_cluster)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        attach_cluster_logs(item, report)
    return report
