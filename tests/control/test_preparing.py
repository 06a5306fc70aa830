"""A prepare that does not come to run: why, for how long, and how it ends."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from posttrain.control.kinds import JOB, POD
from tests.support.bench import Bench, wait_out_pending_deadline

_DAY_SECONDS = 86_400
_PATIENCE_SECONDS = 30
OVER_QUOTA = 'pods "demo-prepare-x7k2p" is forbidden: exceeded quota: team, requested: cpu=2, limited: cpu=1'
NO_ROOM = "0/3 nodes are available: 3 Insufficient cpu."
NO_CLAIM = "pod has unbound immediate PersistentVolumeClaims"
NO_IMAGE = 'Back-off pulling image "registry.example.com/trainer"'

NO_SECRET = 'secret "hub" not found'

Happens = Callable[[Bench], None]


def submit(bench: Bench, **spec: object) -> None:
    bench.submit(prepare={"enabled": True}, **spec)
    bench.settle()


def scheduler_says(message: str) -> Happens:
    def happens(bench: Bench) -> None:
        condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}
        bench.others.set_pod_status(bench.others.make_prepare_pod(), conditions=[condition])

    return happens


def container_waits(reason: str, message: str) -> Happens:
    def happens(bench: Bench) -> None:
        waiting = {"reason": reason, "message": message}
        status = {"name": "prepare", "ready": False, "state": {"waiting": waiting}}
        bench.others.set_pod_status(bench.others.make_prepare_pod(), containerStatuses=[status])

    return happens


image_cannot_be_pulled = container_waits("ImagePullBackOff", NO_IMAGE)
secret_is_missing = container_waits("CreateContainerConfigError", NO_SECRET)


def job_is_refused_its_pod(bench: Bench) -> None:
    message = f"Error creating: {OVER_QUOTA}"
    bench.others.put_event(JOB, "demo-prepare", reason="FailedCreate", message=message)
    bench.wait(_PATIENCE_SECONDS)


POD_WAITS = [
    (image_cannot_be_pulled, "ImagePullFailed", f"pod demo-prepare-x7k2p: {NO_IMAGE}"),
    (secret_is_missing, "ContainerNotStarted", f"pod demo-prepare-x7k2p: {NO_SECRET}"),
    (scheduler_says(NO_ROOM), "Unschedulable", f"pod demo-prepare-x7k2p: {NO_ROOM}"),
    (scheduler_says(NO_CLAIM), "VolumePending", f"pod demo-prepare-x7k2p: {NO_CLAIM}"),
    (job_is_refused_its_pod, "QuotaExceeded", f"1 of 1 pods cannot be created: {OVER_QUOTA}"),
]


@pytest.mark.parametrize(("happens", "reason", "message"), POD_WAITS, ids=[reason for _, reason, _ in POD_WAITS])
def test_a_prepare_pod_that_waits_says_why_and_ends_the_run_at_the_pending_deadline(
    happens: Happens, reason: str, message: str
) -> None:
    bench = Bench()
    submit(bench, pendingDeadlineSeconds=600)
    happens(bench)
    bench.settle()

    prepared = bench.condition("Prepared")
    assert (prepared.status, prepared.reason, prepared.message) == ("False", reason, message)
    assert bench.says("Succeeded") == ("False", "InProgress")
    assert bench.condition("Succeeded").message == f"prepare waits: {message}"
    assert bench.status.stage == "Preparing"

    wait_out_pending_deadline(bench, seconds=600)
    failure = bench.status.failure
    assert failure is not None
    assert (failure.reason, failure.attempt) == ("PendingDeadlineExceeded", 0)
    assert failure.message == f"prepare did not run within 600 s (spec.pendingDeadlineSeconds): {message}"
    assert failure.pod == (None if reason == "QuotaExceeded" else "demo-prepare-x7k2p")
    assert bench.says("Prepared") == ("False", "PendingDeadlineExceeded")
    assert bench.events()[-1] == f"PendingDeadlineExceeded: {failure.message}"
    assert bench.names(JOB) == [], "nothing waits any more"


def test_a_prepare_job_that_nobody_makes_a_pod_for_ends_at_the_pending_deadline() -> None:
    bench = Bench()
    bench.submit(prepare={"enabled": True}, pendingDeadlineSeconds=100)
    assert bench.settle() == _PATIENCE_SECONDS
    wait_out_pending_deadline(bench, seconds=100)

    assert bench.condition("Succeeded").message.endswith("Job demo-prepare makes no pod")


def test_the_deadline_of_a_prepare_pod_that_waits_wakes_the_operator() -> None:
    bench = Bench()
    submit(bench, pendingDeadlineSeconds=600)
    scheduler_says(NO_ROOM)(bench)
    bench.wait(200)

    assert bench.settle() == 400


def test_without_a_pending_deadline_a_prepare_pod_waits_as_long_as_it_takes_and_says_why() -> None:
    bench = Bench()
    submit(bench, activeDeadlineSeconds=600)
    image_cannot_be_pulled(bench)
    bench.wait(_DAY_SECONDS)
    bench.settle()

    assert bench.status.stage == "Preparing"
    assert bench.says("Prepared") == ("False", "ImagePullFailed")


def run_pod(bench: Bench) -> str:
    name = bench.others.make_prepare_pod()
    bench.others.set_pod_status(name, phase="Running", containerStatuses=[{"name": "prepare", "ready": True}])
    return name


def test_a_prepare_pod_that_runs_is_not_pending() -> None:
    bench = Bench()
    submit(bench, pendingDeadlineSeconds=600)
    image_cannot_be_pulled(bench)
    bench.settle()
    run_pod(bench)
    bench.settle()
    assert bench.says("Prepared") == ("False", "Preparing")
    bench.wait(_DAY_SECONDS)
    bench.settle()

    assert bench.status.stage == "Preparing"
    assert bench.condition("Succeeded").message == "Inputs are being checked and fetched."


@pytest.mark.parametrize("restarts", [False, True], ids=["the same operator", "another operator"])
def test_a_prepare_pod_that_follows_one_that_ran_has_the_whole_time(restarts: bool) -> None:
    bench = Bench()
    submit(bench, pendingDeadlineSeconds=600)
    name = run_pod(bench)
    bench.settle()
    bench.wait(_DAY_SECONDS)
    bench.others.tell(attempt=0, source="prepare")
    bench.settle()
    bench.others.remove_pod(name)
    bench.settle()
    if restarts:
        bench.start()
    bench.wait(_PATIENCE_SECONDS)
    bench.settle()
    assert bench.says("Succeeded") == ("False", "InProgress"), "a pod that ran is no pod that never came to run"
    scheduler_says(NO_ROOM)(bench)
    bench.settle()
    assert bench.says("Prepared") == ("False", "Unschedulable")
    bench.wait(600 - _PATIENCE_SECONDS)
    bench.settle()

    assert bench.says("Succeeded") == ("False", "PendingDeadlineExceeded")


def test_a_prepare_pod_that_waits_for_its_next_try_waits_from_the_end_of_the_last() -> None:
    bench = Bench()
    submit(bench, pendingDeadlineSeconds=600)
    name = run_pod(bench)
    bench.settle()
    bench.wait(_DAY_SECONDS)
    bench.others.end_pod(name, exit_code=1)
    bench.settle()
    assert bench.says("Prepared") == ("False", "Preparing")

    wait_out_pending_deadline(bench, seconds=600)
    assert bench.condition("Succeeded").message.endswith("Job demo-prepare makes no pod")


def test_a_suspension_ends_the_wait_of_a_prepare_pod_and_it_begins_anew_afterwards() -> None:
    bench = Bench()
    submit(bench, pendingDeadlineSeconds=600)
    scheduler_says(NO_ROOM)(bench)
    bench.settle()
    bench.others.change_run(suspend=True)
    bench.settle()
    bench.others.finish_deletions()
    bench.wait(_DAY_SECONDS)
    bench.settle()
    assert bench.says("Succeeded") == ("False", "Suspended")
    assert bench.names(JOB, POD) == []

    bench.others.change_run(suspend=False)
    bench.settle()
    scheduler_says(NO_ROOM)(bench)
    wait_out_pending_deadline(bench, seconds=600)


def test_events_are_read_only_of_a_prepare_job_without_a_pod() -> None:
    bench = Bench()
    submit(bench)
    bench.wait(_PATIENCE_SECONDS)
    bench.port.clear()
    bench.settle()
    job = bench.others.find(JOB, "demo-prepare")
    assert job is not None
    asked = [call.body["field_selector"] for call in bench.port.calls if call.text == "list Event"]
    assert asked == [f"involvedObject.uid={job['metadata']['uid']}"]

    run_pod(bench)
    bench.port.clear()
    bench.settle()
    assert [call.text for call in bench.port.calls] == []
