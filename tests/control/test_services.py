"""A gang is made when everything that serves it does: the sandbox of its rewards and its rollout servers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from posttrain.contract import environment
from posttrain.contract.result import ExitCode
from posttrain.control.kinds import CONFIG_MAP, DEPLOYMENT, NETWORK_POLICY, PYTORCHJOB, STATEFUL_SET
from posttrain.control.port import Rejected
from posttrain.settings import Profile, Settings
from tests.support.bench import Bench, wait_out_pending_deadline
from tests.support.faults import Call

SERVED = {
    "sft": None,
    "grpo": {
        "rewards": [{"name": "code"}],
        "rollout": {"mode": "Server", "server": {"replicas": 2, "gpusPerNode": 0}},
        "args": {"max_steps": 20},
    },
}
SANDBOX_SERVES = {"replicas": 1, "readyReplicas": 1}
SERVICES = ["Deployment demo-sandbox", "StatefulSet demo-server"]


def variables(bench: Bench) -> tuple[dict[str, str | None], ...]:
    """Return the environment variables of a server's container and of the gang's."""
    templates = [
        bench.cluster.objects(STATEFUL_SET)[0]["spec"]["template"],
        bench.cluster.objects(PYTORCHJOB)[0]["spec"]["pytorchReplicaSpecs"]["Master"]["template"],
    ]
    return tuple(
        {variable["name"]: variable.get("value") for variable in template["spec"]["containers"][0]["env"]}
        for template in templates
    )


def submit(bench: Bench, **spec: Any) -> None:
    """Let both be made, with pods that do not serve yet."""
    bench.submit(**SERVED, **spec)
    bench.settle()
    bench.others.make_server_pods()
    bench.others.make_sandbox_pod(phase="Running")
    bench.settle()


def servers_answer(bench: Bench) -> None:
    for index in range(2):
        server_answers(bench, index)


def server_answers(bench: Bench, index: int) -> None:
    answers(bench, f"demo-server-{index}")


def answers(bench: Bench, pod: str) -> None:
    bench.others.set_pod_status(
        pod,
        phase="Running",
        conditions=[{"type": "Ready", "status": "True"}],
        containerStatuses=[{"name": "vllm", "ready": True, "restartCount": 0, "state": {"running": {}}}],
    )
    bench.settle()


def sandbox_serves(bench: Bench) -> None:
    bench.cluster.put_status(bench.others.key(DEPLOYMENT, "demo-sandbox"), SANDBOX_SERVES)
    bench.settle()


def test_both_start_at_once_and_the_gang_waits_for_the_sandbox_while_the_servers_answer() -> None:
    bench = Bench()
    submit(bench)
    assert bench.names(DEPLOYMENT, STATEFUL_SET) == SERVICES
    assert (bench.says("PodsReady"), bench.says("ServerReady")) == (("False", "SandboxStarting"), ("False", "Loading"))

    servers_answer(bench)
    assert bench.says("ServerReady") == ("True", "ServersReady")
    assert bench.says("PodsReady") == ("False", "SandboxStarting")
    assert bench.others.job(1) is None

    sandbox_serves(bench)
    assert bench.others.job_runs(1)
    assert bench.says("PodsReady") == ("False", "PodsStarting")


def test_the_gang_waits_for_the_servers_while_the_sandbox_serves() -> None:
    bench = Bench()
    submit(bench)
    sandbox_serves(bench)
    assert bench.says("PodsReady") == bench.says("ServerReady") == ("False", "Loading")
    assert bench.others.job(1) is None

    servers_answer(bench)
    assert bench.others.job_runs(1)


def test_a_server_of_several_nodes_answers_when_all_of_them_do() -> None:
    bench = Bench()
    rollout = {"mode": "Server", "server": {"replicas": 2, "nodesPerReplica": 2, "gpusPerNode": 0}}
    bench.submit(sft=None, grpo={**SERVED["grpo"], "rewards": [{"name": "format"}], "rollout": rollout})
    bench.settle()
    assert bench.others.make_server_pods() == [f"demo-server-{index}" for index in range(4)]

    told = []
    for index in (0, 3, 1, 2):
        server_answers(bench, index)
        told.append(bench.condition("ServerReady").message)

    assert told[:3] == ["0 of 2 servers answer", "0 of 2 servers answer", "1 of 2 servers answer"]
    assert bench.says("ServerReady") == ("True", "ServersReady")
    of_a_server, of_the_gang = variables(bench)
    meetings, addresses = of_a_server[environment.SERVER_NODES], of_the_gang[environment.ROLLOUT_SERVERS]
    assert meetings == "http://demo-server-0.demo-server:8001,http://demo-server-2.demo-server:8001"
    assert addresses == "http://demo-server-0.demo-server:8000,http://demo-server-2.demo-server:8000"


@pytest.mark.parametrize("copy", ["debug", "demo-server-debug", "demo-server-2", "demo-server-01"])
def test_the_copy_of_a_servers_pod_is_no_server_and_keeps_nobody_from_looking_after_the_run(copy: str) -> None:
    bench = Bench()
    submit(bench)
    sandbox_serves(bench)
    server_answers(bench, 0)
    bench.others.copy_pod("demo-server-0", to=copy)
    answers(bench, copy)
    assert bench.condition("ServerReady").message == "1 of 2 servers answer"
    assert bench.others.job(1) is None

    server_answers(bench, 1)
    bench.others.make_pods()
    bench.others.run_pods(1)
    bench.settle()
    bench.others.fail_gang(1, exit_code=138)
    bench.settle()
    assert (bench.status.stage, bench.status.attempt) == ("Restarting", 2)


def test_a_server_whose_pod_is_refused_says_why_beside_a_copy_of_another_one() -> None:
    bench = Bench()
    submit(bench)
    bench.others.remove_pod("demo-server-1")
    bench.others.copy_pod("demo-server-0", to="debug")
    message = "Create Pod demo-server-1 in StatefulSet demo-server failed error: exceeded quota: team"
    bench.others.put_event(STATEFUL_SET, "demo-server", reason="FailedCreate", message=message)
    bench.wait(60)
    bench.settle()

    assert bench.says("ServerReady") == ("False", "QuotaExceeded")
    assert bench.condition("ServerReady").message == "1 of 2 pods cannot be created: exceeded quota: team"


def test_a_copy_of_a_servers_pod_does_not_keep_a_run_from_being_suspended_and_going_on() -> None:
    bench = Bench()
    submit(bench)
    sandbox_serves(bench)
    servers_answer(bench)
    bench.others.copy_pod("demo-server-0", to="debug")
    answers(bench, "debug")
    bench.others.change_run(suspend=True)
    bench.settle()
    bench.others.finish_deletions()
    bench.settle()

    bench.others.change_run(suspend=False)
    bench.settle()
    assert bench.names(DEPLOYMENT, STATEFUL_SET) == SERVICES


def test_a_node_that_waits_for_another_one_ends_with_nobodys_fault() -> None:
    bench = Bench()
    rollout = {"mode": "Server", "server": {"nodesPerReplica": 2, "gpusPerNode": 0}}
    bench.submit(sft=None, grpo={**SERVED["grpo"], "rewards": [{"name": "format"}], "rollout": rollout})
    bench.settle()
    bench.others.make_server_pods()
    unscheduled = {"type": "PodScheduled", "status": "False", "message": "0/4 nodes are available"}
    bench.others.set_pod_status("demo-server-1", phase="Pending", conditions=[unscheduled])
    set_ended(bench, restarts=5, index=0, code=ExitCode.TERMINATED, said="node 0 of 2 ends: it was asked to")

    assert bench.says("ServerReady") == ("False", "Unschedulable")
    assert "demo-server-1: 0/4 nodes are available" in bench.condition("ServerReady").message
    assert bench.says("Succeeded") == ("False", "InProgress")

    set_ended(bench, restarts=5)
    assert bench.says("Succeeded") == ("False", "CrashLooping")


def test_nobody_is_blamed_for_a_node_of_a_server_that_is_lost() -> None:
    bench = Bench()
    rollout = {"mode": "Server", "server": {"nodesPerReplica": 2, "gpusPerNode": 0}}
    bench.submit(sft=None, grpo={**SERVED["grpo"], "rewards": [{"name": "format"}], "rollout": rollout})
    bench.settle()
    bench.others.make_server_pods()
    bench.others.set_pod_status("demo-server-1", phase="Running")
    bench.others.silence("demo-server-1", container="vllm")
    set_ended(bench, restarts=5, index=0, code=ExitCode.TERMINATED, said="node 1 of this server ended, see its log")

    assert bench.says("ServerReady") == ("Unknown", "NodeUnreachable")
    assert bench.says("Succeeded") == ("False", "InProgress")


def take_profile_away(bench: Bench) -> None:
    bench.settings = Settings(profiles={"default": Profile()})
    bench.start()


def change_argument(bench: Bench) -> None:
    bench.others.change_run(grpo={**bench.run["spec"]["grpo"], "args": {"max_steps": 30}})


@pytest.mark.parametrize(("spoil", "reason"), [(take_profile_away, "InvalidSpec"), (change_argument, "SpecChanged")])
def test_servers_go_with_an_attempt_that_cannot_be_made_before_something_is_mended(
    spoil: Callable[[Bench], None], reason: str
) -> None:
    profiles = {"default": Profile(), "h200": Profile()}
    bench = Bench(settings=Settings(profiles=profiles))
    rewards = [{"name": "format"}]
    bench.submit(sft=None, grpo={**SERVED["grpo"], "rewards": rewards}, resources={"gpusPerNode": 0, "profile": "h200"})
    bench.settle()
    bench.others.make_server_pods()
    servers_answer(bench)
    bench.others.make_pods()
    bench.others.run_pods(1)
    bench.settle()
    spoil(bench)
    bench.settle()
    assert bench.names(STATEFUL_SET) == ["StatefulSet demo-server"]

    bench.others.fail_gang(1, exit_code=138)
    bench.settle()
    bench.others.finish_deletions()
    bench.settle()
    assert bench.says("Accepted") == bench.says("ServerReady") == bench.says("PodsReady") == ("False", reason)
    assert bench.names(STATEFUL_SET) == []


def test_settings_that_were_mended_reach_servers_that_are_refused() -> None:
    bench = Bench(settings=Settings(termination_grace_seconds=6000))

    def policy(call: Call) -> Rejected | None:
        if call.text != "create StatefulSet demo-server":
            return None
        grace = call.body["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
        return Rejected("at most 600") if grace > 600 else None

    bench.port.refuse = policy
    bench.submit(**SERVED)
    bench.settle()
    assert bench.says("ServerReady") == ("False", "ChildRejected")
    assert bench.condition("ServerReady").message == "at most 600"

    bench.settings = Settings(termination_grace_seconds=600)
    bench.start()
    for _ in range(3):
        bench.settle()
        bench.wait(31)
    assert bench.says("Accepted") == ("True", "Accepted")
    assert bench.names(STATEFUL_SET) == ["StatefulSet demo-server"]


def test_servers_that_run_keep_their_configuration_when_their_repair_is_refused_under_other_settings() -> None:
    bench = Bench()
    submit(bench)
    bench.settings = Settings(termination_grace_seconds=600)
    bench.start()
    bench.port.refuse = lambda call: Rejected("no") if call.kind == STATEFUL_SET and call.method == "apply" else None
    servers = bench.others.find(STATEFUL_SET, "demo-server")
    assert servers is not None
    bench.cluster.put({**servers, "spec": {**servers["spec"], "replicas": 1}})
    bench.settle()

    assert bench.condition("Accepted").message == "StatefulSet demo-server was refused: no"
    assert bench.others.find(CONFIG_MAP, "demo-server") is not None


def test_a_server_on_a_node_that_is_lost_is_told_of_with_what_brings_it_back() -> None:
    bench = Bench()
    submit(bench)
    sandbox_serves(bench)
    servers_answer(bench)
    bench.others.silence("demo-server-1", container="vllm")
    bench.settle()
    assert bench.says("ServerReady") == ("Unknown", "NodeUnreachable")
    assert bench.condition("ServerReady").message.endswith(
        "does not answer: whether demo-server-1 still serves is not known"
    )

    bench.others.give_up("demo-server-1")
    bench.settle()
    bench.wait(121)
    bench.settle()
    told = bench.condition("ServerReady").message
    assert told.startswith("pod demo-server-1 was deleted, and node")
    assert told.endswith("or the pod by: kubectl delete pod demo-server-1 -n team --force")


def test_a_server_that_never_answers_ends_the_run_also_while_the_sandbox_is_awaited() -> None:
    bench = Bench()
    submit(bench)
    set_ended(bench, restarts=5)

    failure = bench.status.failure
    assert failure is not None
    assert (bench.status.stage, failure.reason, failure.message) == (
        "Failed",
        "CrashLooping",
        "attempt 1: after 5 restarts pod demo-server-1 ends with exit code 1: no memory for keys and values",
    )
    assert bench.names(DEPLOYMENT, STATEFUL_SET) == []


def test_servers_that_never_answer_count_towards_the_pending_deadline() -> None:
    bench = Bench()
    submit(bench, pendingDeadlineSeconds=100)
    sandbox_serves(bench)
    wait_out_pending_deadline(bench, seconds=100)

    assert "0 of 2 servers answer" in bench.condition("Succeeded").message
    assert bench.names(DEPLOYMENT, STATEFUL_SET) == []


def test_a_server_whose_pod_is_refused_says_why() -> None:
    bench = Bench()
    bench.submit(**SERVED)
    bench.settle()
    sandbox_serves(bench)
    message = "Create Pod demo-server-0 in StatefulSet demo-server failed error: exceeded quota: team"
    bench.others.put_event(STATEFUL_SET, "demo-server", reason="FailedCreate", message=message)
    bench.wait(60)
    bench.settle()

    says = ("False", "QuotaExceeded")
    assert (bench.says("ServerReady"), bench.says("PodsReady")) == (says, says)
    assert bench.condition("ServerReady").message == "2 of 2 pods cannot be created: exceeded quota: team"


def set_ended(
    bench: Bench, *, restarts: int, index: int = 1, code: int = 1, said: str = "no memory for keys and values"
) -> None:
    """Let a server load again that has ended, for whatever time."""
    end = {"terminated": {"exitCode": code, "message": said}}
    container = {"name": "vllm", "ready": False, "restartCount": restarts, "lastState": end, "state": {"running": {}}}
    bench.others.set_pod_status(f"demo-server-{index}", phase="Running", conditions=[], containerStatuses=[container])
    bench.settle()


def test_of_a_servers_nodes_the_one_is_told_that_ended_first() -> None:
    bench = Bench()
    submit(bench)
    said = "node 1 of this server ended, see its log"
    set_ended(bench, restarts=1, index=0, code=ExitCode.TERMINATED, said=said)
    assert bench.condition("ServerReady").message.startswith("pod demo-server-0 ends with exit code 143")
    set_ended(bench, restarts=1)
    assert bench.condition("ServerReady").message.startswith("pod demo-server-1 ends with exit code 1: no memory")


def test_restarts_of_a_server_that_answered_in_between_do_not_count() -> None:
    bench = Bench()
    submit(bench)
    sandbox_serves(bench)
    servers_answer(bench)
    bench.others.make_pods()
    bench.others.run_pods(1)
    bench.settle()
    set_ended(bench, restarts=4)
    bench.others.fail_gang(1, exit_code=138)
    bench.settle()
    bench.wait(60)
    bench.settle()
    bench.others.finish_deletions()
    bench.settle()

    set_ended(bench, restarts=8)
    assert (bench.status.attempt, bench.says("Succeeded")) == (2, ("False", "InProgress"))
    set_ended(bench, restarts=9)
    assert bench.says("Succeeded") == ("False", "CrashLooping")


def test_a_server_knows_of_no_sandbox() -> None:
    bench = Bench()
    submit(bench)
    servers_answer(bench)
    sandbox_serves(bench)

    assert [environment.SANDBOX_URLS in names for names in variables(bench)] == [False, True]


def test_a_suspension_takes_both_away_and_the_next_attempt_waits_for_both_again() -> None:
    bench = Bench()
    submit(bench)
    servers_answer(bench)
    sandbox_serves(bench)
    bench.others.change_run(suspend=True)
    bench.settle()
    bench.others.finish_deletions()
    bench.settle()
    assert (bench.status.stage, bench.names(DEPLOYMENT, STATEFUL_SET)) == ("Suspended", [])

    bench.others.change_run(suspend=False)
    bench.settle()
    assert bench.names(DEPLOYMENT, STATEFUL_SET) == SERVICES
    assert (bench.says("PodsReady"), bench.others.job(2)) == (("False", "SandboxStarting"), None)


def test_programs_in_the_sandbox_reach_no_server() -> None:
    bench = Bench()
    submit(bench)

    policies = {item["metadata"]["name"]: item["spec"] for item in bench.cluster.objects(NETWORK_POLICY)}
    ((peer,),) = [rule["from"] for rule in policies["demo"]["ingress"] if "from" in rule]
    assert peer["podSelector"]["matchExpressions"] == [
        {"key": "posttrain.dev/role", "operator": "NotIn", "values": ["sandbox"]}
    ]
    assert policies["demo"]["podSelector"]["matchLabels"] == {"posttrain.dev/run": "demo"}
