"""Events about pods that their nodes do not set up: which are asked for, when, and what is told of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from posttrain.control.kinds import POD
from posttrain.control.port import InternalError, Rejected
from tests.support.bench import Bench

_PATIENCE_SECONDS = 30
NOT_MOUNTED = 'MountVolume.SetUp failed for volume "pvc-0b6c" : mount failed: exit status 32'
MASTER = "demo-a1-master-0"


def start_gang(bench: Bench, *, nodes: int = 1, **spec: Any) -> list[str]:
    """Let a gang be made, and its pods be bound; return their names."""
    bench.submit(resources={"numNodes": nodes, "gpusPerNode": 0}, **spec)
    bench.settle()
    names = bench.others.make_pods()
    for name in names:
        bench.others.bind_pod(name)
    return names


def asked(bench: Bench) -> list[str]:
    """Return the pods whose events were asked for, and forget the calls."""
    selectors = [call.body["field_selector"] for call in bench.port.calls if call.text == "list Event"]
    bench.port.clear()
    pods = {
        f"involvedObject.uid={pod['metadata']['uid']}": pod["metadata"]["name"] for pod in bench.cluster.objects(POD)
    }
    return [pods[selector] for selector in selectors]


@pytest.mark.parametrize(
    ("event", "reason"),
    [
        ("FailedMount", "VolumePending"),
        ("FailedAttachVolume", "VolumePending"),
        ("FailedMapVolume", "VolumePending"),
        ("FailedCreatePodSandBox", "ContainerNotStarted"),
    ],
)
def test_a_pod_that_its_node_does_not_set_up_says_what_the_kubelet_says(event: str, reason: str) -> None:
    bench = Bench()
    start_gang(bench)
    bench.others.put_event(POD, MASTER, reason=event, message=NOT_MOUNTED)
    assert bench.settle() == _PATIENCE_SECONDS
    assert bench.says("PodsReady") == ("False", "PodsStarting"), "a kubelet mostly needs more than one try"
    assert asked(bench) == []

    bench.wait(_PATIENCE_SECONDS)
    assert bench.settle() == _PATIENCE_SECONDS, "nobody watches events"
    ready = bench.condition("PodsReady")
    assert (ready.reason, ready.message) == (reason, f"pod {MASTER}: {NOT_MOUNTED}")
    assert bench.condition("Succeeded").message == f"attempt 1: pod {MASTER}: {NOT_MOUNTED}"


def test_the_events_of_a_pod_are_read_once_at_each_look_and_no_more_once_it_runs() -> None:
    bench = Bench()
    start_gang(bench)
    bench.wait(_PATIENCE_SECONDS)
    bench.look()
    assert asked(bench) == [MASTER]
    bench.wait(_PATIENCE_SECONDS)
    bench.look()
    assert asked(bench) == [MASTER]

    bench.others.run_pods(1)
    bench.look()
    assert asked(bench) == []
    assert bench.says("PodsReady") == ("True", "AllPodsRunning")


def test_a_pod_that_pulls_its_image_is_asked_nothing() -> None:
    bench = Bench()
    start_gang(bench)
    bench.others.bind_pod(MASTER, set_up=True)
    bench.wait(_PATIENCE_SECONDS)

    assert bench.settle() is None
    assert asked(bench) == []


def test_only_the_first_pods_of_a_large_gang_are_asked() -> None:
    bench = Bench()
    names = start_gang(bench, nodes=8)
    bench.wait(_PATIENCE_SECONDS)
    bench.look()

    assert asked(bench) == names[:4]


def test_an_event_that_another_one_followed_is_past() -> None:
    bench = Bench()
    start_gang(bench)
    bench.others.put_event(POD, MASTER, reason="FailedMount", message=NOT_MOUNTED)
    bench.wait(_PATIENCE_SECONDS)
    bench.others.put_event(POD, MASTER, reason="Pulling", message='Pulling image "trainer"')
    bench.settle()

    assert bench.says("PodsReady") == ("False", "PodsStarting")


@pytest.mark.parametrize("error", [InternalError("etcdserver: request timed out"), Rejected("events is forbidden")])
def test_events_that_cannot_be_read_cost_their_words_and_nothing_else(error: Exception) -> None:
    bench = Bench()
    start_gang(bench, nodes=2)
    bench.others.put_event(POD, MASTER, reason="FailedMount", message=NOT_MOUNTED)
    bench.wait(_PATIENCE_SECONDS)
    bench.port.refuse = lambda call: error if call.text == "list Event" else None
    assert bench.settle() == _PATIENCE_SECONDS
    assert bench.says("PodsReady") == ("False", "PodsStarting")
    assert bench.says("Accepted") == ("True", "Accepted")

    bench.others.fail_gang(1, exit_code=138)
    bench.settle()
    assert bench.status.attempt == 2


def test_a_run_that_has_ended_asks_for_no_events() -> None:
    bench = Bench()
    start_gang(bench, activeDeadlineSeconds=60, pendingDeadlineSeconds=60)
    bench.wait(60)
    bench.settle()
    assert bench.says("Succeeded") == ("False", "PendingDeadlineExceeded")
    bench.port.clear()
    bench.wait(60)

    assert bench.settle() is None
    assert asked(bench) == []


# --- Beside the gang -------------------------------------------------------------------------------------------------

REWARDED = {"sft": None, "grpo": {"rewards": [{"name": "code"}], "args": {"max_steps": 20}}}
SERVED = {
    "sft": None,
    "grpo": {
        "rewards": [{"name": "format"}],
        "rollout": {"mode": "Server", "server": {"replicas": 1, "gpusPerNode": 0}},
    },
}


def make_prepare_pod(bench: Bench) -> str:
    return bench.others.make_prepare_pod()


def make_server_pod(bench: Bench) -> str:
    return bench.others.make_server_pods()[0]


def make_sandbox_pod(bench: Bench) -> str:
    bench.others.make_sandbox_pod()
    return "demo-sandbox-6d9f7-x2x9z"


@pytest.mark.parametrize(
    ("spec", "make_pod", "condition"),
    [
        ({"prepare": {"enabled": True}}, make_prepare_pod, "Prepared"),
        (SERVED, make_server_pod, "ServerReady"),
        (REWARDED, make_sandbox_pod, "PodsReady"),
    ],
    ids=["prepare", "server", "sandbox"],
)
def test_every_other_pod_of_a_run_says_it_too(
    spec: dict[str, Any], make_pod: Callable[[Bench], str], condition: str
) -> None:
    bench = Bench()
    bench.submit(**spec)
    bench.settle()
    pod = make_pod(bench)
    bench.others.bind_pod(pod)
    bench.others.put_event(POD, pod, reason="FailedMount", message=NOT_MOUNTED)
    bench.wait(_PATIENCE_SECONDS)
    bench.settle()

    told = bench.condition(condition)
    assert (told.reason, told.message) == ("VolumePending", f"pod {pod}: {NOT_MOUNTED}")
