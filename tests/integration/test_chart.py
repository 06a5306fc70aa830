"""The chart on a real API server: what it installs is taken, what it grants is enough, what should last lasts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import yaml

from tests.cluster.cluster import TestCluster
from tests.cluster.errors import ClusterError
from tests.cluster.kwok import NODE_SELECTOR, TOLERATION
from tests.support.helm import CHART, find_helm, helm
from tests.support.tiers import require, require_own_cluster

pytestmark = pytest.mark.integration

NAMESPACE = "posttrain-system"
RUNS = "trainingruns.posttrain.dev"
ACCOUNT = f"system:serviceaccount:{NAMESPACE}:posttrain-operator"


@dataclass(frozen=True)
class Release:
    """The chart, installed."""

    cluster: TestCluster

    def helm(self, command: str, *arguments: str) -> str:
        return helm(
            *(command, "posttrain", *arguments, "--namespace", NAMESPACE),
            *("--kubeconfig", self.cluster.kubeconfig),
        )

    def upgrade(self, **settings: Any) -> None:
        """Install or upgrade with these settings; what kubectl changed meanwhile is set again."""
        values = {"nodeSelector": NODE_SELECTOR, "tolerations": [TOLERATION], "settings": settings}
        file = self.cluster.folder / "chart-values.yaml"
        file.write_text(yaml.safe_dump(values))
        self.helm("upgrade", str(CHART), "--install", "--force-conflicts", "--values", str(file))

    def certificate(self) -> dict[str, Any]:
        secret: dict[str, Any] = self.cluster.get("secret", "posttrain-progress-tls", "--namespace", NAMESPACE)
        return secret


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestCluster]:
    """One of its own: definitions and roles are the whole cluster's, and other tests bring theirs."""
    require_own_cluster("control-plane", why="the chart's definitions and roles are the whole cluster's")
    require("control-plane")
    find_helm()
    with TestCluster.start(tmp_path_factory.mktemp("chart")) as started:
        started.add_fake_nodes(2)
        yield started


@pytest.fixture(scope="module")
def release(cluster: TestCluster) -> Release:
    """The chart in a namespace that takes restricted pods only."""
    cluster.create_namespace(NAMESPACE)
    cluster.kubectl("label", "namespace", NAMESPACE, "pod-security.kubernetes.io/enforce=restricted")
    release = Release(cluster)
    release.upgrade()
    return release


def may(cluster: TestCluster, user: str, verb: str, resource: str, *, namespace: str, subresource: str = "") -> bool:
    what = (verb, resource, f"--subresource={subresource}")
    try:
        cluster.kubectl("auth", "can-i", *what, "--namespace", namespace, "--as", user)
    except ClusterError:
        return False
    return True


def test_its_pods_are_admitted_as_restricted_ones_on_nodes_of_their_own(release: Release) -> None:
    pods = release.cluster.await_json(
        *("pods", "--namespace", NAMESPACE, "--selector", "app.kubernetes.io/instance=posttrain"),
        until=lambda found: (
            [pod["status"]["phase"] for pod in found["items"]] == ["Running"] * 2
            and len({pod["spec"]["nodeName"] for pod in found["items"]}) == 2
        ),
        what="both replicas to run on a node each",
    )

    assert {pod["spec"]["serviceAccountName"] for pod in pods["items"]} == {"posttrain-operator"}
    (key,) = [volume["secret"] for volume in pods["items"][0]["spec"]["volumes"] if "secret" in volume]
    assert key["defaultMode"] == 0o440


def test_the_operator_may_not_read_secrets(release: Release, namespace: str) -> None:
    assert may(release.cluster, ACCOUNT, "create", "pytorchjobs.kubeflow.org", namespace=namespace)
    assert may(release.cluster, ACCOUNT, "patch", RUNS, namespace=namespace, subresource="status")
    for verb in ("get", "list", "watch"):
        assert not may(release.cluster, ACCOUNT, verb, "secrets", namespace=namespace)
    assert may(release.cluster, ACCOUNT, "get", "leases.coordination.k8s.io/posttrain-operator", namespace=NAMESPACE)
    assert not may(release.cluster, ACCOUNT, "get", "leases.coordination.k8s.io/another", namespace=NAMESPACE)


def test_who_edits_a_namespace_may_start_runs_in_it(release: Release, namespace: str) -> None:
    release.cluster.kubectl(
        "create", "rolebinding", "user", "--clusterrole=edit", "--user=jane", "--namespace", namespace
    )
    release.cluster.kubectl(
        "create", "rolebinding", "viewer", "--clusterrole=view", "--user=joe", "--namespace", namespace
    )

    assert may(release.cluster, "jane", "create", RUNS, namespace=namespace)
    assert not may(release.cluster, "jane", "patch", RUNS, namespace=namespace, subresource="status")
    assert may(release.cluster, "joe", "list", RUNS, namespace=namespace)
    assert not may(release.cluster, "joe", "create", RUNS, namespace=namespace)


def test_an_upgrade_keeps_the_certificate_until_it_nears_its_end_or_the_host_is_another(release: Release) -> None:
    first = release.certificate()

    release.upgrade(prepareCpu="4")
    assert release.certificate()["data"] == first["data"]

    release.upgrade(progressServer={"url": "https://reports.example.com"})
    elsewhere = release.certificate()
    assert elsewhere["data"]["tls.crt"] != first["data"]["tls.crt"]
    assert elsewhere["metadata"]["annotations"]["posttrain.dev/host"] == "reports.example.com"

    release.cluster.kubectl(
        *("annotate", "secret", "posttrain-progress-tls", "--namespace", NAMESPACE),
        *("--overwrite", "posttrain.dev/renew-after=1"),
    )
    release.upgrade(progressServer={"url": "https://reports.example.com"})
    renewed = release.certificate()
    assert renewed["data"]["tls.crt"] != elsewhere["data"]["tls.crt"]
    assert int(renewed["metadata"]["annotations"]["posttrain.dev/renew-after"]) > 1


def test_runs_stay_when_the_chart_goes_and_are_there_when_it_comes_back(release: Release, namespace: str) -> None:
    run = {
        "apiVersion": "posttrain.dev/v1alpha1",
        "kind": "TrainingRun",
        "metadata": {"name": "stays"},
        "spec": {"model": {"source": "org/model"}, "datasets": [{"source": "org/data"}], "sft": {}},
    }
    release.cluster.apply([run], namespace=namespace)

    release.helm("uninstall")

    left = release.cluster.get("deployments,secrets,services,configmaps", "--namespace", NAMESPACE)["items"]
    assert [item["metadata"]["name"] for item in left] == ["kube-root-ca.crt"]
    assert release.cluster.get("trainingrun", "stays", "--namespace", namespace)["metadata"]["name"] == "stays"
    release.upgrade()
    assert release.cluster.get("deployment", "posttrain-operator", "--namespace", NAMESPACE)
