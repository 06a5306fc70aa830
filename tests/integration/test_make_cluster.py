"""A cluster that `make cluster` starts: it outlives the command, and is used by its kubeconfig until it is stopped."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from posttrain.local.shim import descendants
from tests.cluster.__main__ import Place
from tests.cluster.components import KUBERNETES, program
from tests.cluster.errors import ClusterError
from tests.cluster.external import CLEAN_UP, GUEST, ExternalCluster, NotUsableError
from tests.integration.conftest import CRD
from tests.support.processes import is_alive, wait_for
from tests.support.tiers import require

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
FORGOTTEN_SECONDS = 60.0
"""Until the garbage collector has seen that a node's lease has no node."""
IN_TESTS = (
    "tests/integration/test_admission.py::test_what_is_asked_of_a_queue_cannot_be_edited_while_quota_is_held",
    "tests/integration/test_cluster.py::test_a_component_can_be_paused",
    "tests/integration/test_training_run.py::test_a_failed_pod_restarts_the_whole_gang",
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """Where such a cluster runs."""
    require("control-plane")
    place = Place(tmp_path_factory.mktemp("dev"))
    assert "started below" in run("up", "--shape", "fake", "--folder", place.folder)
    yield place
    run("down", "--folder", place.folder)


def call(*args: str | Path) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "tests.cluster", *map(str, args)]
    return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)


def run(*args: str | Path) -> str:
    done = call(*args)
    assert done.returncode == 0, done.stderr
    return done.stdout


def kubectl(place: Place, *args: str | Path) -> str:
    where = ("--kubeconfig", place.kubeconfig, "--cache-dir", place.folder / "kubectl-cache")
    argv = [program(KUBERNETES, "kubectl"), *where, *args]
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout


def everything_in(place: Place) -> set[str]:
    """Return kind, namespace, name and UID of every object there is, but for events, which go by themselves."""
    kinds = kubectl(place, "api-resources", "--verbs=list", "--output=name").split()
    listed = ",".join(kind for kind in kinds if not kind.startswith("events"))
    columns = ",".join(f"{at}:{at}" for at in (".kind", ".metadata.namespace", ".metadata.name", ".metadata.uid"))
    text = kubectl(place, "get", listed, "--all-namespaces", "--no-headers", f"--output=custom-columns={columns}")
    return {" ".join(line.split()) for line in text.splitlines()}


def await_the_same(place: Place, before: set[str]) -> None:
    """Wait until a cluster has what it had."""
    assert before
    wait_for(lambda: everything_in(place) == before, what="everything as it was", seconds=FORGOTTEN_SECONDS)


def test_tests_run_in_the_cluster_of_a_kubeconfig_and_leave_it_as_it_was(place: Place) -> None:
    before = everything_in(place)

    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-n0", "-p", "no:cacheprovider", "-rA", *IN_TESTS],
        cwd=ROOT,
        env={**os.environ, "POSTTRAIN_KUBECONFIG": str(place.kubeconfig), "POSTTRAIN_REQUIRE": "control-plane"},
        capture_output=True,
        text=True,
        check=False,
    )

    assert ran.returncode == 0, ran.stdout
    assert "2 passed, 1 skipped" in ran.stdout.splitlines()[-1]
    assert "NOT RUN: control-plane: $POSTTRAIN_KUBECONFIG names a cluster that these tests did not start" in ran.stdout
    await_the_same(place, before)


def test_what_somebody_else_made_there_is_not_touched(place: Place, tmp_path: Path) -> None:
    before = everything_in(place)
    metadata = {"name": "mine"}
    with ExternalCluster.join(tmp_path, kubeconfig=place.kubeconfig) as cluster:
        (node,) = cluster.add_fake_nodes(1)
        assert node == "fake-4"
        for manifest, said in (
            ({"kind": "Node", "metadata": {"name": "fake-0"}}, "Node fake-0 is there already"),
            (
                {"kind": "ConfigMap", "metadata": {**metadata, "namespace": "default"}},
                "the namespace default, which was",
            ),
        ):
            with pytest.raises(ClusterError, match=said):
                cluster.apply(
                    [{"apiVersion": "v1", "kind": "Namespace", "metadata": metadata}, {"apiVersion": "v1", **manifest}]
                )
        with pytest.raises(ClusterError, match='"kube-public" already exists'):
            cluster.create_namespace("kube-public")

    await_the_same(place, before)


def test_a_cluster_in_which_the_tests_operator_would_meet_another_is_not_used(place: Place, tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match="there is no kubeconfig"):
        ExternalCluster.join(tmp_path, kubeconfig=tmp_path / "none")
    kubectl(place, "create", "--filename", CRD)
    before = everything_in(place)
    try:
        with pytest.raises(NotUsableError, match=r"would act on runs that are not its own: uninstall posttrain there"):
            ExternalCluster.join(tmp_path, kubeconfig=place.kubeconfig)
        kubectl(place, "label", "--filename", CRD, f"{GUEST}=killed")
        with pytest.raises(NotUsableError, match="other tests use it, or were killed"):
            ExternalCluster.join(tmp_path, kubeconfig=place.kubeconfig)
        assert everything_in(place) == before
    finally:
        kubectl(place, *CLEAN_UP.split()[1:])
    assert "trainingruns" not in kubectl(place, "get", "customresourcedefinitions", "--output=name")
    assert "node/fake-0" in kubectl(place, "get", "nodes", "--output=name")


def test_a_cluster_is_started_once_and_stopped(place: Place) -> None:
    here = ("--folder", place.folder)
    owner = place.running()
    assert owner is not None
    pids = [owner.pid, *descendants(owner.pid)]
    assert "runs already" in run("up", "--shape", "fake", *here)
    without = call("up", "--quickstart", *here)
    assert (without.returncode, without.stdout) == (1, "")
    assert "runs without the quickstart: `make cluster-down` first" in without.stderr
    nodes = kubectl(place, "get", "nodes", "--output", "name").split()
    assert nodes == [f"node/fake-{number}" for number in range(4)]

    assert "no cluster runs" in run("down", *here)

    assert not any(map(is_alive, pids))
    assert place.running() is None
    assert "no cluster runs" in run("down", *here)
