"""What a plan needs to know of the cluster, gathered from the cache.

It owns whose an object is: the run's by its controller reference, or by its label where a claim outlives its run and
the run retains its own. It must not judge anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from posttrain.api.training_run import KIND
from posttrain.control.kinds import CLAIM, POD
from posttrain.plan import labels
from posttrain.plan.manifests import parse_time
from posttrain.plan.types import Manifest, ObjectRef


@dataclass(frozen=True, kw_only=True)
class Belongings:
    """Everything that bears a run's label, by whose it is."""

    objects: Mapping[ObjectRef, Manifest] = field(default_factory=dict)
    """The run's own children."""
    pods: tuple[Manifest, ...] = ()
    """Pods of its jobs, and of such as are gone already."""
    departed: tuple[Manifest, ...] = ()
    """Last states of its pods that the cluster took, or that somebody deleted."""
    foreign: frozenset[ObjectRef] = frozenset()
    """Somebody else's objects that bear the label."""
    predecessors: tuple[Manifest, ...] = ()
    """What an earlier run of the same name left and the garbage collector has not taken yet."""


def sort_belongings(run: Manifest, labelled: Iterable[Manifest], *, departed: Iterable[Manifest] = ()) -> Belongings:
    """Return what bears the label of `run`, sorted by whose it is; `departed` are pods that bore it."""
    uid = run["metadata"]["uid"]
    objects: dict[ObjectRef, Manifest] = {}
    pods, foreign, predecessors = [], set(), []
    for manifest in labelled:
        ref, owner = ObjectRef.of(manifest), controller_of(manifest)
        if (ref.api_version, ref.kind) == POD:
            if is_older(manifest, than=run):
                predecessors.append(manifest)
            else:
                pods.append(manifest)
        elif is_of_run(manifest, uid=uid, name=run["metadata"]["name"], retains=retains_claim(run)):
            objects[ref] = manifest
        elif owner is not None and owner.get("kind") == KIND and owner.get("name") == run["metadata"]["name"]:
            predecessors.append(manifest)
        else:
            foreign.add(ref)
    return Belongings(
        objects=objects,
        pods=tuple(pods),
        departed=tuple(pod for pod in departed if not is_older(pod, than=run)),
        foreign=frozenset(foreign),
        predecessors=tuple(predecessors),
    )


def is_older(pod: Manifest, *, than: Manifest) -> bool:
    """Return whether a pod was made before the run: an earlier run of the name left it."""
    made, born = (parse_time(manifest["metadata"].get("creationTimestamp")) for manifest in (pod, than))
    return made is not None and born is not None and made < born


def retains_claim(run: Mapping[str, Any]) -> bool:
    """Return whether the claim made for a run outlives it; as stored, the default may be left out."""
    checkpoints = (run.get("spec") or {}).get("checkpoints") or {}
    return bool(checkpoints.get("retain", "Always") == "Always")


def is_of_run(manifest: Manifest, *, uid: str, name: str, retains: bool) -> bool:
    """Return whether an object is the run's: never because of its name alone.

    A claim without an owner was retained for a person. A run that retains nothing would own it, and take it along at
    its end.
    """
    owner = controller_of(manifest)
    if owner is not None:
        return bool(owner.get("uid") == uid)
    own = manifest["metadata"].get("labels") or {}
    retained = retains and (manifest["apiVersion"], manifest["kind"]) == CLAIM
    return retained and own.get(labels.RUN) == name and own.get(labels.MANAGED_BY) == labels.MANAGER


def controller_of(manifest: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the controller's reference among an object's owners, or None."""
    references = manifest["metadata"].get("ownerReferences") or ()
    return next((dict(reference) for reference in references if reference.get("controller")), None)
