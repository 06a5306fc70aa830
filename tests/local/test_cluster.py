"""LocalCluster shows jobs and pods as Kubernetes and the training operator show them, with real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import closing
from datetime import timedelta
from pathlib import Path

from posttrain.local.cluster import LocalCluster
from posttrain.plan.types import ObjectRef
from tests.support.local_cluster import (
    JOB,
    PYTORCHJOB,
    FakeTokens,
    await_observed,
    build_batch_job,
    build_job,
    env,
    has_condition,
    now,
    open_cluster,
    phases,
    terminated,
)
from tests.support.processes import FOREVER, TELL, await_gone, await_pids, read_pids, wait_for

MASTER = "demo-a1-master-0"
WORKER = "demo-a1-worker-0"


BY_NODE = "import os\nmaster = os.environ['RANK'] == '0'\n"


def test_a_job_runs_one_pod_a_node_and_succeeds_with_its_master(cluster: LocalCluster, pids: Path) -> None:
    until_told = "while not pathlib.Path(os.environ['PIDS'], 'end').exists(): time.sleep(0.01)"
    cluster.apply(build_job(TELL + until_told, workers=1, env=env(pids)))

    started = cluster.observe()
    assert phases(started) == {MASTER: "Running", WORKER: "Running"}
    running = await_observed(cluster, lambda o: has_condition(o, PYTORCHJOB, "Running"), what="Running")
    assert running.objects[PYTORCHJOB]["status"]["replicaStatuses"] == {
        "Master": {"active": 1},
        "Worker": {"active": 1},
    }
    (pids / "end").touch()
    ended = await_observed(cluster, lambda o: has_condition(o, PYTORCHJOB, "Succeeded"), what="the end")

    status = ended.objects[PYTORCHJOB]["status"]
    assert [(c["type"], c["status"], c["reason"]) for c in status["conditions"]] == [
        ("Created", "True", "PyTorchJobCreated"),
        ("Running", "False", "PyTorchJobRunning"),
        ("Succeeded", "True", "PyTorchJobSucceeded"),
    ]
    assert status["completionTime"] >= status["startTime"]
    assert terminated(ended, MASTER)["reason"] == "Completed"


def test_a_masters_success_ends_the_job_and_takes_running_workers_away(cluster: LocalCluster, pids: Path) -> None:
    cluster.apply(build_job(BY_NODE + TELL + "master or signal.pause()", workers=1, env=env(pids)))

    ended = await_observed(cluster, lambda o: phases(o) == {MASTER: "Succeeded"}, what="the worker's deletion")

    assert has_condition(ended, PYTORCHJOB, "Succeeded")
    await_gone(read_pids(pids), seconds=0.1)


def test_a_workers_failure_fails_the_job_and_takes_the_master_away(cluster: LocalCluster, pids: Path) -> None:
    cluster.apply(build_job(BY_NODE + TELL + "signal.pause() if master else sys.exit(3)", workers=1, env=env(pids)))

    ended = await_observed(cluster, lambda o: phases(o) == {WORKER: "Failed"}, what="the master's deletion")

    failed = next(c for c in ended.objects[PYTORCHJOB]["status"]["conditions"] if c["type"] == "Failed")
    assert failed["message"] == "PyTorchJob demo-a1 is failed because 1 Worker replica(s) failed."
    assert terminated(ended, WORKER)["exitCode"] == 3
    await_gone(read_pids(pids), seconds=0.1)


def test_a_killed_process_shows_as_exit_code_137(cluster: LocalCluster, pids: Path) -> None:
    cluster.apply(build_job(FOREVER, env=env(pids)))
    cluster.observe()
    (pid,) = await_pids(pids, count=1)

    os.kill(pid, signal.SIGKILL)

    ended = await_observed(cluster, lambda o: has_condition(o, PYTORCHJOB, "Failed"), what="the end")
    assert terminated(ended, MASTER) | {"startedAt": "", "finishedAt": ""} == {
        "exitCode": 137,
        "signal": 9,
        "reason": "Error",
        "startedAt": "",
        "finishedAt": "",
    }


def test_the_termination_file_is_the_pods_message_cut_to_4_kib(cluster: LocalCluster) -> None:
    program = "import os, pathlib; pathlib.Path(os.environ['MESSAGE']).write_text('é' * 4000)"
    variable = [{"name": "MESSAGE", "value": "/dev/termination-log"}]
    cluster.apply(build_job(program, env=variable, terminationMessagePath="/dev/termination-log"))

    ended = await_observed(cluster, lambda o: phases(o) == {MASTER: "Succeeded"}, what="the end")

    assert terminated(ended, MASTER)["message"] == "é" * 2048


def test_deleting_a_job_gives_its_pods_their_grace_period_and_shows_them_until_they_have_ended(
    cluster: LocalCluster, pids: Path
) -> None:
    program = TELL + (
        "def stop(*_):\n    pathlib.Path(os.environ['PIDS'], 'stopping').touch()\n    signal.pause()\n"
        "signal.signal(signal.SIGTERM, stop)\nsignal.signal(signal.SIGUSR1, lambda *_: os._exit(143))\nsignal.pause()"
    )
    cluster.apply(build_job(program, grace_seconds=120, env=env(pids)))
    cluster.observe()
    (pid,) = await_pids(pids, count=1)
    before = now()

    cluster.delete(PYTORCHJOB)
    deleted = cluster.observe()
    wait_for((pids / "stopping").exists, what="SIGTERM")

    assert PYTORCHJOB not in deleted.objects
    (pod,) = cluster.observe().pods
    assert pod["status"]["phase"] == "Running"
    assert pod["metadata"]["deletionTimestamp"] > (before + timedelta(seconds=119)).isoformat()
    assert pod["metadata"]["deletionGracePeriodSeconds"] == 120
    os.kill(pid, signal.SIGUSR1)
    await_observed(cluster, lambda o: not o.pods, what="the pod's end")


def test_a_pod_that_does_not_stop_is_killed_when_its_grace_period_is_over(cluster: LocalCluster, pids: Path) -> None:
    deaf = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + FOREVER
    cluster.apply(build_job(deaf, grace_seconds=1, env=env(pids)))
    cluster.observe()
    await_pids(pids, count=1)

    cluster.delete(PYTORCHJOB)

    await_observed(cluster, lambda o: not o.pods, what="the pod's end")
    await_gone(read_pids(pids), seconds=0.1)


def test_kill_ends_every_pod_at_once_also_those_that_are_being_deleted(cluster: LocalCluster, pids: Path) -> None:
    deaf = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + FOREVER
    cluster.apply(build_job(deaf, grace_seconds=3600, workers=1, env=env(pids)))
    cluster.observe()
    await_pids(pids, count=2)
    cluster.delete(PYTORCHJOB)

    cluster.kill()

    await_observed(cluster, lambda o: not o.pods, what="the pods' end")
    assert not cluster.has_live_pods


def test_a_killed_shim_fails_its_pod_and_nothing_of_it_is_left(cluster: LocalCluster, pids: Path) -> None:
    child = f"subprocess.Popen([sys.executable, '-c', {FOREVER!r}], start_new_session=True); signal.pause()"
    # As in every pod of a plan, a variable names a folder of the pod: by it what is left is found.
    template = {
        "env": [*env(pids), {"name": "POSTTRAIN_RUNTIME", "value": "/run/posttrain"}],
        "volumeMounts": [{"name": "runtime", "mountPath": "/run/posttrain"}],
    }
    job = build_job(TELL + child, **template)
    job["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]["volumes"] = [{"name": "runtime", "emptyDir": {}}]
    cluster.apply(job)
    (pod,) = cluster.observe().pods
    await_pids(pids, count=2)
    ((shim, _), _) = json.loads(pod["metadata"]["annotations"]["posttrain.dev/process"])

    os.kill(shim, signal.SIGKILL)

    ended = await_observed(cluster, lambda o: phases(o) == {MASTER: "Failed"}, what="the pod's end")
    assert terminated(ended, MASTER)["reason"] == "ContainerStatusUnknown"
    await_gone(read_pids(pids), seconds=0.1)


def test_the_logs_of_a_deleted_pod_stay(tmp_path: Path, cluster: LocalCluster) -> None:
    cluster.apply(build_job("print('hello')"))
    await_observed(cluster, lambda o: has_condition(o, PYTORCHJOB, "Succeeded"), what="the end")

    cluster.delete(PYTORCHJOB)

    assert cluster.observe().pods == ()
    assert (tmp_path / "demo" / "logs" / f"{MASTER}.log").read_text() == "hello\n"


def test_a_pods_token_is_its_attempts_and_ends_with_it(tmp_path: Path, pids: Path) -> None:
    tokens = FakeTokens()
    with closing(open_cluster(tmp_path / "demo", tokens=tokens)) as cluster:
        cluster.apply(build_job(FOREVER, env=env(pids)))
        cluster.observe()
        await_pids(pids, count=1)
        assert (tokens.issued, tokens.valid) == ([1], {"token-1"})

        cluster.delete(PYTORCHJOB)
        await_observed(cluster, lambda o: not o.pods, what="the pod's end")

        assert tokens.valid == set()


# --- Job -------------------------------------------------------------------------------------------------------------


def test_a_batch_job_completes_with_its_pod(cluster: LocalCluster) -> None:
    cluster.apply(build_batch_job("pass"))

    ended = await_observed(cluster, lambda o: has_condition(o, JOB, "Complete"), what="the end")

    assert phases(ended) == {"demo-prepare-0": "Succeeded"}


def test_exit_code_2_fails_a_batch_job_without_another_try(cluster: LocalCluster) -> None:
    cluster.apply(build_batch_job("raise SystemExit(2)"))

    ended = await_observed(cluster, lambda o: has_condition(o, JOB, "Failed"), what="the end")

    (condition,) = ended.objects[JOB]["status"]["conditions"]
    assert condition["reason"] == "PodFailurePolicy"
    assert "failed with exit code 2" in condition["message"]
    assert phases(ended) == {"demo-prepare-0": "Failed"}


def test_a_batch_job_tries_again_until_its_limit_is_reached(tmp_path: Path) -> None:
    # An hour ahead of the processes: no delay before the next try is left to wait for.
    with closing(open_cluster(tmp_path / "demo", clock=lambda: now() + timedelta(hours=1))) as cluster:
        cluster.apply(build_batch_job("raise SystemExit(1)", backoff_limit=2))

        ended = await_observed(cluster, lambda o: has_condition(o, JOB, "Failed"), what="the end")

        assert phases(ended) == {f"demo-prepare-{i}": "Failed" for i in range(3)}


# --- Objects ---------------------------------------------------------------------------------------------------------


def test_applying_the_same_object_again_changes_nothing(cluster: LocalCluster) -> None:
    manifest = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "demo-a1"}, "data": {"a": "1"}}
    ref = ObjectRef.of(manifest)

    cluster.apply(manifest)
    created = cluster.get(ref)
    cluster.apply(manifest)
    same = cluster.get(ref)
    cluster.apply({**manifest, "data": {"a": "2"}})
    changed = cluster.get(ref)

    assert created is not None
    assert changed is not None
    assert created == same
    assert changed["data"] == {"a": "2"}
    assert changed["metadata"]["uid"] == created["metadata"]["uid"]
    assert cluster.list("ConfigMap") == [changed]


# --- After a crash ---------------------------------------------------------------------------------------------------

KILLED = """
import os, sys
from pathlib import Path
from tests.support.local_cluster import build_job, open_cluster
from tests.support.processes import DAEMON, await_pids

folder, pids = map(Path, sys.argv[1:])
deaf = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\\n" + DAEMON + "signal.pause()"
env = [{"name": "PIDS", "value": str(pids)}, {"name": "MESSAGE", "value": "/dev/termination-log"}]
cluster = open_cluster(folder)
cluster.apply(build_job(deaf, workers=1, env=env))
cluster.observe()
await_pids(pids, count=4)
os.kill(os.getpid(), 9)
"""


def run_and_kill(folder: Path, *, pids: Path) -> None:
    """Let another process start a gang of two pods that do not obey, and kill it."""
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    killed = subprocess.run([sys.executable, "-c", KILLED, str(folder), str(pids)], env=environ, check=False)
    assert killed.returncode == -signal.SIGKILL


def test_the_next_cluster_ends_what_a_killed_one_left_and_shows_its_pods_as_lost(tmp_path: Path, pids: Path) -> None:
    run_and_kill(tmp_path / "demo", pids=pids)

    with closing(open_cluster(tmp_path / "demo")) as cluster:
        await_gone(read_pids(pids), seconds=0.1)
        observed = cluster.observe()

        assert phases(observed) == {MASTER: "Failed", WORKER: "Failed"}
        assert {pod["status"]["reason"] for pod in observed.pods} == {"NodeLost"}
        assert has_condition(observed, PYTORCHJOB, "Failed")


def test_what_outlived_its_shim_is_found_by_its_environment(tmp_path: Path, pids: Path) -> None:
    run_and_kill(tmp_path / "demo", pids=pids)
    pods = [json.loads(file.read_text()) for file in (tmp_path / "demo" / "objects").glob("Pod-*.json")]
    for pod in pods:
        for pid, _ in json.loads(pod["metadata"]["annotations"]["posttrain.dev/process"]):
            os.kill(pid, signal.SIGKILL)

    with closing(open_cluster(tmp_path / "demo")):
        await_gone(read_pids(pids), seconds=0.1)


def test_a_lost_pod_of_a_batch_job_costs_no_try(tmp_path: Path) -> None:
    with closing(open_cluster(tmp_path / "demo")) as cluster:
        cluster.apply(build_batch_job("pass", backoff_limit=0))
        cluster.observe()
    file = tmp_path / "demo" / "objects" / "Pod-demo-prepare-0.json"
    pod = json.loads(file.read_text())
    pod["status"] = {"phase": "Running", "conditions": []}
    file.write_text(json.dumps(pod))

    with closing(open_cluster(tmp_path / "demo")) as cluster:
        ended = await_observed(cluster, lambda o: has_condition(o, JOB, "Complete"), what="the end")

        assert phases(ended) == {"demo-prepare-0": "Failed", "demo-prepare-1": "Succeeded"}
