"""Real training in real pods: the chart's operator, the training operator, a kubelet, TRL, and a tiny real model."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cluster.cluster import TestCluster
from tests.support.cluster_runs import ClusterRun, reasons, tiny
from tests.support.release import Release, add_storage

pytestmark = pytest.mark.e2e

START_SECONDS = 300.0
"""From apply to the end of a short run: three pods import torch one after the other, on two cores."""


@pytest.fixture
def run(release: Release, node_cluster: TestCluster, node_namespace: str, tiny_model: Path, rows: Path) -> ClusterRun:
    """A run that is not applied yet, with its inputs on a claim."""
    copies = {"model": tiny_model, "train.jsonl": rows}
    add_storage(node_cluster, node_namespace, "inputs", copies=copies)
    add_storage(node_cluster, node_namespace, "shared")
    return ClusterRun(node_cluster, node_namespace)


def test_a_model_is_trained_by_two_pods_and_lies_on_the_claim(run: ClusterRun) -> None:
    run.apply(**tiny())

    ended = run.await_status(lambda s: s.get("completionTime"), what="the end", seconds=START_SECONDS)

    assert reasons(ended)["Succeeded"] == ("True", "Completed"), ended.get("failure")
    progress = ended["progress"]
    assert (progress["step"], progress["maxSteps"], progress["worldSize"], progress["percentage"]) == (6, 6, 2, 100)
    assert ended["checkpoints"]["latestStep"] == 6
    assert ended["model"] == {"uri": f"pvc://shared/{run.name}/model"}
    storage = run.cluster.folder / "volumes" / run.namespace / "shared"
    assert list(storage.rglob("model.safetensors")), sorted(path.name for path in storage.rglob("*"))
