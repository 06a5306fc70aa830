"""Tiers of tests that need programs which are built beforehand: whether they can run here, and what they leave to read.

A tier that cannot run says so as `NOT RUN: <part>: <why>`. $POSTTRAIN_REQUIRE names the parts that must run
(`control-plane,node,kueue`): CI promises them, and there it is a failure. $POSTTRAIN_KUBECONFIG names a cluster that is
used instead of one that is started; a test that asks more of its cluster than such a one can give is not run.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import pytest

from tests.cluster.any_cluster import Cluster
from tests.cluster.components import why_not
from tests.cluster.external import ExternalCluster, NotUsableError
from tests.support.operator_process import OperatorProcess, Replicas

_LOGGED = (Cluster, OperatorProcess, Replicas)
_KUBECONFIG = "POSTTRAIN_KUBECONFIG"


def require(*parts: str) -> None:
    """Skip the test that asks, or fail where the part was promised, unless all parts can be run here."""
    for part in parts:
        if reason := why_not(part):
            _give_up(part, reason)


def require_own_cluster(part: str, *, why: str) -> None:
    """Skip the test that asks where $POSTTRAIN_KUBECONFIG names a cluster, as it needs one that it has started."""
    if external_kubeconfig() is not None:
        pytest.skip(f"NOT RUN: {part}: ${_KUBECONFIG} names a cluster that these tests did not start: {why}")


def external_kubeconfig() -> Path | None:
    """Return the kubeconfig of the cluster to be used instead of one that is started."""
    named = os.environ.get(_KUBECONFIG)
    return Path(named).absolute() if named else None


def join_external(kubeconfig: Path, folder: Path) -> ExternalCluster:
    """Begin to use that cluster; where it cannot be used, skip the test that asks, or fail as `require`.

    Raises:
        ClusterError: it is not there.
    """
    try:
        return ExternalCluster.join(folder, kubeconfig=kubeconfig)
    except NotUsableError as error:
        _give_up("control-plane", f"the cluster of ${_KUBECONFIG} ({kubeconfig}) cannot be used: {error}")


def _give_up(part: str, reason: str) -> NoReturn:
    message = f"NOT RUN: {part}: {reason}"
    if part in os.environ.get("POSTTRAIN_REQUIRE", "").split(","):
        pytest.fail(message, pytrace=False)
    pytest.skip(message)


@contextmanager
def fresh_namespace(cluster: Cluster) -> Iterator[str]:
    """Make a namespace, and delete it at the end without waiting until it is gone."""
    name = f"test-{uuid.uuid4().hex[:8]}"
    cluster.create_namespace(name)
    yield name
    cluster.kubectl("delete", "namespace", name, "--wait=false")


def attach_cluster_logs(item: pytest.Item, report: pytest.TestReport) -> None:
    """Add the end of every component's log, and of every operator's, to the report of a test that failed with them."""
    fixtures = item.funcargs.values() if isinstance(item, pytest.Function) else ()
    tails = {
        name: text for fixture in fixtures if isinstance(fixture, _LOGGED) for name, text in fixture.log_tails().items()
    }
    report.sections += [(f"end of {name}'s log", text) for name, text in tails.items() if text]
