"""When a run without a queue may take another shape: while the condition QuotaReserved says that it holds nothing."""

from __future__ import annotations

from typing import Any

import pytest

from posttrain.contract.facts import NonFinite
from posttrain.control.kinds import CONFIG_MAP, JOB, PYTORCHJOB
from posttrain.control.port import Rejected
from posttrain.settings import Profile, Settings
from tests.support.bench import Bench
from tests.support.controllers import RefusedEdit
from tests.support.faults import Call

SMALL: dict[str, Any] = {"numNodes": 1, "gpusPerNode": 1, "profile": "h200"}
LARGE: dict[str, Any] = {"numNodes": 3, "gpusPerNode": 1}
OTHER: dict[str, Any] = {"numNodes": 1, "gpusPerNode": 1}
HELD, SUSPENDED, REFUSED = ("True", "NoQueue"), ("False", "Suspended"), ("False", "InvalidSpec")


def submit(**spec: Any) -> Bench:
    bench = Bench(settings=Settings(profiles={"default": Profile(), "h200": Profile(node_selector={"gpu": "h200"})}))
    bench.submit(resources=SMALL, **spec)
    bench.settle()
    return bench


def train(**spec: Any) -> Bench:
    bench = submit(**spec)
    bench.others.make_pods()
    bench.others.run_pods(1)
    bench.settle()
    return bench


def take_profile_away(bench: Bench) -> None:
    """Begin anew as an operator in whose settings the run's profile is no more."""
    bench.settings = Settings()
    bench.start()
    bench.settle()


def end_pods(bench: Bench) -> None:
    bench.others.finish_deletions()
    bench.settle()


def suspend(bench: Bench, value: bool) -> None:
    bench.others.change_run(suspend=value)
    bench.settle()


def shape(bench: Bench, attempt: int) -> tuple[int, Any]:
    """Return how many pods an attempt's job has, and where they go."""
    job = bench.others.job(attempt)
    assert job is not None, f"the job of attempt {attempt} is there"
    replicas = job["spec"]["pytorchReplicaSpecs"].values()
    (selector,) = {str(replica["template"]["spec"].get("nodeSelector") or {}) for replica in replicas}
    return sum(replica["replicas"] for replica in replicas), selector


def test_a_suspended_run_takes_another_shape_once_its_pods_have_ended() -> None:
    bench = train()
    assert (bench.says("QuotaReserved"), shape(bench, 1)) == (HELD, (1, "{'gpu': 'h200'}"))
    with pytest.raises(RefusedEdit):
        bench.others.change_run(resources=LARGE)

    suspend(bench, True)
    assert (bench.status.stage, bench.says("QuotaReserved")) == ("Suspended", HELD)
    end_pods(bench)
    assert (bench.says("QuotaReserved"), bench.condition("QuotaReserved").message) == (
        SUSPENDED,
        "spec.suspend is true",
    )
    bench.others.change_run(resources=LARGE)
    bench.settle()
    suspend(bench, False)

    assert bench.says("Accepted") == ("True", "Accepted")
    assert (bench.says("QuotaReserved"), shape(bench, 2)) == (HELD, (3, "{}"))


def test_a_run_takes_another_shape_before_it_has_begun() -> None:
    bench = submit(suspend=True)
    assert bench.says("QuotaReserved") == SUSPENDED
    bench.others.change_run(resources=LARGE)
    suspend(bench, False)

    assert (bench.says("QuotaReserved"), shape(bench, 1)) == (HELD, (3, "{}"))


def test_a_run_that_prepares_takes_another_shape_when_it_is_suspended() -> None:
    bench = submit(prepare={"enabled": True})
    assert bench.says("QuotaReserved") == HELD
    suspend(bench, True)
    assert (bench.says("QuotaReserved"), bench.names(JOB)) == (SUSPENDED, [])
    bench.others.change_run(resources=LARGE)
    suspend(bench, False)

    assert (bench.status.stage, bench.says("QuotaReserved")) == ("Preparing", HELD)


def test_nothing_of_a_gang_is_made_before_the_condition_keeps_the_spec_as_it_is() -> None:
    bench = train()
    suspend(bench, True)
    end_pods(bench)
    seen: list[tuple[str, tuple[str, str]]] = []

    def watch(call: Call) -> None:
        if call.method == "create" and call.kind[1] != "Event":
            seen.append((call.text, bench.says("QuotaReserved")))

    bench.port.refuse = watch
    suspend(bench, False)

    assert seen == [("create ConfigMap demo-a2", HELD), ("create PyTorchJob demo-a2", HELD)]


def test_an_edit_at_the_moment_of_a_resumption_is_planned_with() -> None:
    bench = train()
    suspend(bench, True)
    end_pods(bench)
    edits = [LARGE]

    def edit(call: Call) -> None:
        if call.method == "apply_status" and edits:
            bench.others.change_run(resources=edits.pop())

    bench.others.change_run(suspend=False)
    bench.port.refuse = edit
    bench.settle()

    assert (bench.says("QuotaReserved"), shape(bench, 2)) == (HELD, (3, "{}"))
    bench.others.make_pods()
    bench.others.run_pods(2)
    bench.settle()
    assert bench.says("PodsReady") == ("True", "AllPodsRunning")


def test_a_run_that_is_held_takes_another_shape_and_goes_on() -> None:
    bench = train(restarts={"onNonFinite": "Suspend"})
    bench.others.tell(NonFinite(metric="loss", step=7), attempt=1)
    bench.settle()
    end_pods(bench)
    assert bench.says("QuotaReserved") == bench.says("Succeeded") == ("False", "NonFiniteLoss")

    bench.others.change_run(resources=LARGE)
    bench.settle()
    assert (bench.says("QuotaReserved"), shape(bench, 2)) == (HELD, (3, "{}"))


@pytest.mark.parametrize("suspended", [False, True])
def test_a_run_that_lost_its_gang_and_its_profile_takes_another_one(suspended: bool) -> None:
    bench = train()
    take_profile_away(bench)
    assert (bench.says("Accepted"), bench.says("QuotaReserved")) == (REFUSED, HELD)
    bench.others.fail_gang(1, exit_code=138)
    bench.settle()
    end_pods(bench)
    assert (bench.says("Accepted"), bench.says("QuotaReserved")) == (REFUSED, REFUSED)
    if suspended:
        suspend(bench, True)
        assert (bench.says("Accepted"), bench.says("QuotaReserved")) == (REFUSED, SUSPENDED)
    bench.others.change_run(resources=OTHER)
    bench.settle()
    suspend(bench, False)

    assert bench.says("Accepted") == ("True", "Accepted")
    assert (bench.says("QuotaReserved"), shape(bench, 2)) == (HELD, (1, "{}"))


@pytest.mark.parametrize("prepares", [True, False])
def test_a_run_that_lost_its_profile_before_it_had_a_gang_takes_another_one(prepares: bool) -> None:
    bench = submit(prepare={"enabled": True})
    if not prepares:
        for kind in (JOB, CONFIG_MAP):
            bench.others.delete(kind, "demo-prepare")
    take_profile_away(bench)
    assert bench.says("Accepted") == REFUSED
    assert bench.says("QuotaReserved") == (REFUSED if prepares else ("Unknown", "Pending"))

    bench.others.change_run(resources=OTHER)
    bench.settle()
    assert (bench.says("Accepted"), bench.says("QuotaReserved")) == (("True", "Accepted"), HELD)


def test_a_gang_that_is_refused_keeps_the_shape_until_the_run_is_suspended() -> None:
    bench = Bench()
    bench.port.refuse = lambda call: Rejected("denied by policy") if call.text == "create PyTorchJob demo-a1" else None
    bench.submit(resources=OTHER)
    bench.settle()
    assert (bench.says("Accepted"), bench.says("QuotaReserved")) == (("False", "ChildRejected"), HELD)
    suspend(bench, True)
    assert bench.says("QuotaReserved") == SUSPENDED
    bench.others.change_run(resources=LARGE)
    bench.port.refuse = lambda call: None
    bench.wait(60)
    suspend(bench, False)

    assert bench.names(PYTORCHJOB) == ["PyTorchJob demo-a1"]
    assert (bench.says("QuotaReserved"), shape(bench, 1)) == (HELD, (3, "{}"))
