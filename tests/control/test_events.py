"""How an event of a run is written."""

from __future__ import annotations

from posttrain.control.events import build_event
from posttrain.plan.types import Event, Manifest
from tests.support.builders import T0, at

RUN: Manifest = {
    "apiVersion": "posttrain.dev/v1alpha1",
    "kind": "TrainingRun",
    "metadata": {"name": "demo", "namespace": "team", "uid": "u-1", "resourceVersion": "7"},
}
EVENT = Event(type="Warning", reason="NodeLost", message="node-0 is gone")


def test_an_event_names_its_run_and_says_who_tells_it() -> None:
    built = build_event(RUN, EVENT, now=T0)

    name = built["metadata"].pop("name")
    assert name.startswith("demo.")
    assert len(name) == len("demo.") + 16
    assert built == {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"namespace": "team"},
        "involvedObject": {
            "apiVersion": "posttrain.dev/v1alpha1",
            "kind": "TrainingRun",
            "namespace": "team",
            "name": "demo",
            "uid": "u-1",
            "resourceVersion": "7",
        },
        "type": "Warning",
        "reason": "NodeLost",
        "message": "node-0 is gone",
        "source": {"component": "posttrain"},
        "reportingComponent": "posttrain",
        "firstTimestamp": "2026-03-01T09:00:00Z",
        "lastTimestamp": "2026-03-01T09:00:00Z",
        "count": 1,
    }


def test_the_same_event_at_the_same_moment_has_one_name_and_any_other_another() -> None:
    def name(run: Manifest = RUN, *, seconds: float = 0, **changes: str) -> str:
        event = Event(**{"type": EVENT.type, "reason": EVENT.reason, "message": EVENT.message, **changes})
        return str(build_event(run, event, now=at(seconds))["metadata"]["name"])

    later = {**RUN, "metadata": {**RUN["metadata"], "resourceVersion": "8"}}
    anew = {**RUN, "metadata": {**RUN["metadata"], "uid": "u-2"}}
    others = [name(anew), name(seconds=1), name(type="Normal"), name(reason="Evicted"), name(message="another")]

    assert name() == name(later)
    assert len({name(), *others}) == 6


def test_a_message_is_cut_to_what_the_server_takes() -> None:
    built = build_event(RUN, Event(type="Normal", reason="Accepted", message="x" * 5000), now=T0)

    assert built["message"] == "x" * 1024
