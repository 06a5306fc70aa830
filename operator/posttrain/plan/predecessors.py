"""What an earlier run of the same name has left, and for how long a new one waits for it.

It owns that judgement; it must not know how it is told which objects those are.

Two things are waited for: a pod that lives may still write to the storage that the new run takes over, and an object
keeps its name until it is gone. The pods of jobs and of StatefulSets bear names that the new run's will bear too; those
of prepare and of the sandbox do not, having a random part: one of these that is being deleted counts as gone when its
node has been silent for long enough, as it would in its own run.
"""

from __future__ import annotations

from datetime import datetime

from posttrain.plan import labels
from posttrain.plan.manifests import node_name, silent_from
from posttrain.plan.pods import how_to_release
from posttrain.plan.situation import Situation
from posttrain.plan.status import Says
from posttrain.plan.types import Manifest

_NAMED_AT_RANDOM = frozenset({labels.ROLE_PREPARE, labels.ROLE_SANDBOX})


def explain_predecessors(situation: Situation) -> Says | None:
    """Return what of an earlier run is waited for, the one first that does not go by itself; None where nothing is."""
    waited_for = _waited_for(situation)
    if not waited_for:
        return None
    left = min(waited_for, key=lambda one: (not _is_silent(one, now=situation.now), one["kind"] != "Pod", _name(one)))
    told = f"waiting for {left['kind']} {_name(left)}, which an earlier run of this name left"
    if _is_silent(left, now=situation.now):
        told = (
            f"{told}: it was deleted, and node {node_name(left)} does not say that it has ended. A pod of this run "
            f"would bear its name. {how_to_release(left)}"
        )
    return Says("False", "PredecessorEnding", told)


def is_stuck(situation: Situation) -> bool:
    """Return whether a person has to end what is waited for."""
    return any(_is_silent(one, now=situation.now) for one in _waited_for(situation))


def predecessors_silences(situation: Situation) -> tuple[datetime, ...]:
    """Return when something else will be told of them, should nothing more be heard of their nodes."""
    times = map(_silent_from, situation.observed.predecessors)
    return tuple(time for time in times if time is not None)


def _waited_for(situation: Situation) -> list[Manifest]:
    return [
        one
        for one in situation.observed.predecessors
        if not (_is_silent(one, now=situation.now) and _role(one) in _NAMED_AT_RANDOM)
    ]


def _is_silent(manifest: Manifest, *, now: datetime) -> bool:
    silent = _silent_from(manifest)
    return silent is not None and silent <= now


def _silent_from(manifest: Manifest) -> datetime | None:
    return silent_from(manifest) if manifest["kind"] == "Pod" else None


def _role(manifest: Manifest) -> str | None:
    return (manifest["metadata"].get("labels") or {}).get(labels.ROLE)


def _name(manifest: Manifest) -> str:
    return str(manifest["metadata"]["name"])
