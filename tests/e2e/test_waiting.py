"""A real kubelet does not start a pod: the run says why, in its words."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cluster.cluster import TestCluster
from tests.support.cluster_runs import ClusterRun, message_of, reasons, tiny
from tests.support.operator_process import add_claim
from tests.support.release import Release, add_storage

pytestmark = pytest.mark.e2e


@pytest.fixture
def run(release: Release, node_cluster: TestCluster, node_namespace: str) -> ClusterRun:
    """A run that is not applied yet; what it would read is not there."""
    add_storage(node_cluster, node_namespace, "inputs")
    return ClusterRun(node_cluster, node_namespace)


def test_a_secret_that_is_missing_is_named_until_somebody_makes_it(run: ClusterRun) -> None:
    add_storage(run.cluster, run.namespace, "shared")
    run.apply(**tiny(access={"hubTokenSecretRef": {"name": "hub", "key": "token"}}))

    waiting = run.await_status(lambda s: reasons(s)["Prepared"][1] == "ContainerNotStarted", what="the container")

    assert message_of(waiting, "Prepared").endswith(': secret "hub" not found')
    run.kubectl("create", "secret", "generic", "hub", "--from-literal=token=none")
    # It runs now, and finds that no model lies on the claim.
    assert run.await_stage("Failed")["failure"]["reason"] == "ModelNotFound"


@pytest.mark.parametrize(("prepares", "condition"), [(True, "Prepared"), (False, "PodsReady")], ids=["prepare", "gang"])
def test_a_volume_that_the_node_does_not_mount_is_told_of(run: ClusterRun, prepares: bool, condition: str) -> None:
    add_claim(run.cluster, run.namespace, "shared", folder=Path("/nowhere"), must_exist=True)
    run.apply(**tiny(prepare={"enabled": prepares}, pendingDeadlineSeconds=600))

    waiting = run.await_status(lambda s: reasons(s)[condition][1] == "VolumePending", what="the volume")

    assert "/nowhere is not a directory" in message_of(waiting, condition)
    run.patch({"pendingDeadlineSeconds": 1})
    assert reasons(run.await_stage("Failed"))["Succeeded"] == ("False", "PendingDeadlineExceeded")


def test_an_image_that_the_node_cannot_pull_is_named(run: ClusterRun) -> None:
    add_storage(run.cluster, run.namespace, "shared")
    image = "127.0.0.1:9/trainer:none"
    run.apply(**tiny(podOverrides={"image": image}, prepare={"enabled": False}, pendingDeadlineSeconds=600))

    waiting = run.await_status(lambda s: reasons(s)["PodsReady"][1] == "ImagePullFailed", what="the image")

    message = message_of(waiting, "PodsReady")
    assert "pod demo-a1-" in message and image in message and "connection refused" in message
    run.patch({"pendingDeadlineSeconds": 1})
    assert reasons(run.await_stage("Failed"))["Succeeded"] == ("False", "PendingDeadlineExceeded")
