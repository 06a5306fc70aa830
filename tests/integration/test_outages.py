"""The API server goes away, or its watches lie: the operator stays, asks with patience, and knows all when it is over.

$POSTTRAIN_OUTAGE_SECONDS says how long the API server is down.
"""

from __future__ import annotations

import os
import re
import socket
import ssl
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

import pytest

from tests.cluster.cluster import TestCluster
from tests.support.api_proxy import ApiProxy, ApiRequest, watch_error
from tests.support.certificates import TestAuthority
from tests.support.cluster_runs import ClusterRun, message_of, reasons
from tests.support.operator_process import OperatorProcess, Replicas
from tests.support.processes import wait_for

pytestmark = pytest.mark.integration

OUTAGE_SECONDS = float(os.environ.get("POSTTRAIN_OUTAGE_SECONDS", "25"))
RESYNC_SECONDS = 6
SLACK_SECONDS = 6.0
"""For a machine with two cores that does other things as well."""
REQUESTS_PER_SECOND_MAX = 8.0
"""Four or five are the lease, the resync of every kind and the retries; a loop that does not wait makes hundreds."""
SETTINGS = {"operator": {"resyncSeconds": RESYNC_SECONDS}}
WATCHED = ("trainingruns", "pytorchjobs", "pods", "configmaps", "serviceaccounts", "networkpolicies", "jobs")


@pytest.fixture
def operator(proxy: ApiProxy, replicas: Replicas) -> OperatorProcess:
    """An operator behind the proxy that lists everything anew every few seconds."""
    return replicas.add("operator", kubeconfig=proxy.kubeconfig, settings=SETTINGS)


@pytest.fixture
def run(faulty_cluster: TestCluster, operator: OperatorProcess, faulty_namespace: str) -> ClusterRun:
    """A run whose first gang runs."""
    run = ClusterRun(faulty_cluster, faulty_namespace)
    run.apply()
    run.await_running()
    return run


def watch_over(operator: OperatorProcess, proxy: ApiProxy, *, seconds: float) -> float:
    """Look at an operator for a while, in which it must live; return how many requests a second it makes."""
    pid, began, before = operator.process.pid, time.monotonic(), len(proxy.requests)

    def is_over() -> bool:
        assert operator.is_alive(), "/healthz does not answer"
        assert operator.process.pid == pid, "the operator was started again"
        return time.monotonic() - began >= seconds

    wait_for(is_over, what="time to pass", seconds=seconds + 60)
    return (len(proxy.requests) - before) / (time.monotonic() - began)


def end_attempt(run: ClusterRun, attempt: int) -> None:
    """Let an attempt fail by its node, and wait for the next."""
    run.end_pod(1, attempt=attempt, exit_code=138)
    run.await_running(attempt=attempt + 1)


def test_the_operator_outlives_an_api_server_that_is_down(
    faulty_cluster: TestCluster, operator: OperatorProcess, proxy: ApiProxy, run: ClusterRun
) -> None:
    pid = operator.process.pid
    faulty_cluster.api_server.stop()
    try:
        rate = watch_over(operator, proxy, seconds=OUTAGE_SECONDS)
        status, text = operator.readiness()
    finally:
        faulty_cluster.api_server.start()
    answers = time.monotonic()
    wait_for(operator.is_ready, what="the operator to lead again", seconds=60)
    print(
        f"\n{OUTAGE_SECONDS:.0f} s without an API server: {rate:.1f} requests a second, "
        f"working {time.monotonic() - answers:.1f} s after it"
    )
    # It ends where its cache and the API server disagree about a pod's node, as after an outage they may.
    faulty_cluster.processes["kube-scheduler"].restart()
    assert (status, text.startswith("lease: ")) == (503, True), text
    assert rate < REQUESTS_PER_SECOND_MAX

    end_attempt(run, 1)
    ended = run.complete(attempt=2)

    assert ended["restarts"]["infrastructure"] == 1
    assert operator.process.pid == pid
    assert operator.is_ready()


def test_an_error_in_every_watch_costs_nothing_but_new_watches(
    operator: OperatorProcess, proxy: ApiProxy, run: ClusterRun
) -> None:
    told = {resource: proxy.tell_watches(resource, watch_error(500, "InternalError")) for resource in WATCHED}
    assert told == dict.fromkeys(WATCHED, 1)

    rate = watch_over(operator, proxy, seconds=2 * RESYNC_SECONDS)
    print(f"\nafter an error in every watch: {rate:.1f} requests a second")
    assert rate < REQUESTS_PER_SECOND_MAX
    end_attempt(run, 1)
    assert operator.is_ready()


def test_a_child_that_is_deleted_while_its_watch_is_cut_and_expired_is_made_again(
    operator: OperatorProcess, proxy: ApiProxy, run: ClusterRun
) -> None:
    for resource in WATCHED:
        proxy.watch_errors[resource] = watch_error(410, "Expired")
        proxy.cut_watches(resource)
    run.kubectl("delete", "networkpolicy", run.name)

    seconds = seconds_until_made(proxy, "networkpolicies", run.name)
    print(f"\nseen after {seconds:.1f} s")
    assert seconds < RESYNC_SECONDS + SLACK_SECONDS
    # It asks less and less often.
    first, then = (watch_over(operator, proxy, seconds=2 * RESYNC_SECONDS) for _ in range(2))
    print(f"while every watch is answered with 410: {first:.1f}, then {then:.1f} requests a second")
    assert then < REQUESTS_PER_SECOND_MAX
    proxy.watch_errors.clear()
    end_attempt(run, 1)


def test_a_job_that_is_deleted_while_its_watch_tells_nothing_is_missed_within_one_resync(
    proxy: ApiProxy, run: ClusterRun
) -> None:
    proxy.muted |= set(WATCHED)
    run.kubectl("delete", "pytorchjob", f"{run.name}-a1")

    seconds = seconds_until_made(proxy, "pytorchjobs", f"{run.name}-a2")
    print(f"\nseen after {seconds:.1f} s")
    # A list finds the job gone, and the next one its pods.
    assert seconds < 2 * RESYNC_SECONDS + SLACK_SECONDS
    proxy.muted.clear()
    run.await_running(attempt=2)
    # Jobs and pods are listed each in their own time: what is missed first is the job, or a pod that went with it.
    assert run.status()["failure"]["reason"] in {"JobDeleted", "PodDeleted"}


def test_a_run_whose_deletion_nobody_told_of_gets_no_children(
    faulty_cluster: TestCluster, proxy: ApiProxy, run: ClusterRun
) -> None:
    proxy.muted.add("trainingruns")
    run.kubectl("delete", "trainingrun", run.name)
    deleted = time.monotonic()
    faulty_cluster.await_json(
        *(
            "pytorchjobs,pods,serviceaccounts",
            "--namespace",
            run.namespace,
            "--selector",
            f"posttrain.dev/run={run.name}",
        ),
        until=lambda found: not found["items"],
        what="the garbage collector",
    )
    wait_for(lambda: time.monotonic() - deleted > RESYNC_SECONDS + SLACK_SECONDS, what="a resync", seconds=60)

    made = [str(asked) for asked in proxy.writes(run.namespace) if asked.at > deleted and asked.method == "POST"]
    assert made == []


@contextmanager
def webhook_that_is_away(_: Path) -> Iterator[dict[str, str]]:
    """Nothing listens there."""
    yield {"url": "https://127.0.0.1:9/validate"}


@contextmanager
def webhook_that_is_slow(folder: Path) -> Iterator[dict[str, str]]:
    """Something there takes every question, and never answers."""
    files = TestAuthority().write(folder)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(files.certificate, files.key)
    asked: list[socket.socket] = []

    def take() -> None:
        with suppress(OSError):
            while True:
                asked.append(tls.wrap_socket(listening.accept()[0], server_side=True))

    with socket.create_server(("127.0.0.1", 0)) as listening, ThreadPoolExecutor(1) as executor:
        taking = executor.submit(take)
        url = f"https://127.0.0.1:{listening.getsockname()[1]}/validate"
        try:
            yield {"url": url, "caBundle": b64encode(files.authority.read_bytes()).decode()}
            assert not taking.done()
            assert asked
        finally:
            listening.shutdown(socket.SHUT_RDWR)
    for connection in asked:
        connection.close()


@pytest.mark.parametrize(
    ("webhook", "words"),
    [
        (webhook_that_is_away, r"Internal error occurred: failed calling webhook .*"),
        # Whichever of the two notices first that the time is over.
        (
            webhook_that_is_slow,
            r"(Timeout: request did not complete|Internal error occurred: failed calling webhook) .*",
        ),
    ],
)
def test_a_webhook_that_does_not_answer_is_told_and_the_run_begins_when_it_is_gone(
    faulty_cluster: TestCluster,
    operator: OperatorProcess,
    faulty_namespace: str,
    webhook: Callable[[Path], AbstractContextManager[dict[str, str]]],
    words: str,
    tmp_path: Path,
) -> None:
    with webhook(tmp_path) as client:
        see_refusal(faulty_cluster, faulty_namespace, client=client, words=words)


def see_refusal(cluster: TestCluster, namespace: str, *, client: dict[str, str], words: str) -> None:
    """Let a webhook be asked about the NetworkPolicy of a run, and see that this is told until it is not any more."""
    webhook = {
        "name": "policies.example.com",
        "clientConfig": client,
        "timeoutSeconds": 30,
        "rules": [
            {
                "apiGroups": ["networking.k8s.io"],
                "apiVersions": ["v1"],
                "operations": ["CREATE"],
                "resources": ["networkpolicies"],
            }
        ],
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": namespace}},
        "failurePolicy": "Fail",
        "sideEffects": "None",
        "admissionReviewVersions": ["v1"],
    }
    kind = {"apiVersion": "admissionregistration.k8s.io/v1", "kind": "ValidatingWebhookConfiguration"}
    cluster.apply([{**kind, "metadata": {"name": namespace}, "webhooks": [webhook]}])
    run = ClusterRun(cluster, namespace)
    try:
        run.apply()
        told = run.await_status(lambda status: reasons(status)["Accepted"][1] == "ChildRejected", what="the refusal")
        pods = run.kubectl("get", "pods,pytorchjobs", "--output", "name")
    finally:
        cluster.kubectl("delete", "validatingwebhookconfiguration", namespace)
    message = message_of(told, "Accepted")
    print(f"\n{message}")
    assert re.fullmatch(f"NetworkPolicy {run.name} was refused: {words}", message)
    assert pods == ""

    run.await_running()
    assert run.status()["attempt"] == 1


def seconds_until_made(proxy: ApiProxy, resource: str, name: str) -> float:
    """Return how long it takes until the operator creates an object, from now."""
    began = time.monotonic()

    def creates_it(asked: ApiRequest) -> bool:
        return asked.at >= began and (asked.method, asked.resource, asked.name) == ("POST", resource, name)

    wait_for(lambda: any(map(creates_it, list(proxy.requests))), what=f"{resource}/{name} to be made", seconds=60)
    return time.monotonic() - began
