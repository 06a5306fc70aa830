"""Tiers of tests that need programs which are built beforehand: whether they can run here, and what they leave to read.

A tier that cannot run says so as `NOT RUN: <part>: <why>`. $POSTTRAIN_REQUIRE names the parts that must run
(`control-plane,node,kueue`): CI promises them, and there it is a failure.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.cluster.cluster import TestCluster
from tests.cluster.components import why_not
from tests.support.operator_process import OperatorProcess, Replicas

_LOGGED = (TestCluster, OperatorProcess, Replicas)


def require(*parts: str) -> None:
    """Skip the test that asks, or fail where the part was promised, unless all parts can be run here."""
    promised = os.environ.get("POSTTRAIN_REQUIRE", "").split(",")
    for part in parts:
        if reason := why_not(part):
            message = f"NOT RUN: {part}: {reason}"
            if part in promised:
                pytest.fail(message, pytrace=False)
            pytest.skip(message)


@contextmanager
def fresh_namespace(cluster: TestCluster) -> Iterator[str]:
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
