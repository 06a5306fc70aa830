"""What the operator has seen of the cluster: runs, their children, the pods.

It owns the newest known state of each object and who is told of a change; it must not ask the cluster for anything, nor
change an object.

An object is kept as compressed JSON, and without what no plan reads: a pod has ten kilobytes of it, and finished runs
are many and seldom looked at.
"""

from __future__ import annotations

import math
import zlib
from collections import OrderedDict, deque
from collections.abc import Callable, Container
from dataclasses import dataclass

import orjson

from posttrain.control.kinds import POD, TRAINING_RUN, Kind
from posttrain.control.port import ObjectKey
from posttrain.control.wakes import PROMPT_SECONDS, fingerprint, patience_seconds
from posttrain.plan import labels
from posttrain.plan.manifests import is_being_deleted, pod_condition
from posttrain.plan.types import Manifest

RunKey = tuple[str, str]
"""Namespace and name of a run."""

_TOMBSTONES = 20_000
_WINDOW_BITS = 13
"""Eight kilobytes, as much as most objects have: the default's larger tables cost more than to compress one."""
_DEPARTED = 8
"""How many pods of a run are remembered when they are gone: the first of an attempt to go may be its end's cause."""


@dataclass(frozen=True, slots=True)
class _Entry:
    uid: str
    version: int
    wakes: int
    """A hash over what a plan may act upon."""
    packed: bytes


class Cache:
    """The objects by key, and those of a run by its label."""

    def __init__(self, *, on_change: Callable[[RunKey, float], None]) -> None:
        """`on_change` is given the run, and for how many seconds others of its changes may be waited for."""
        self._on_change = on_change
        self._entries: dict[Kind, dict[tuple[str, str], _Entry]] = {}
        self._of_run: dict[RunKey, set[ObjectKey]] = {}
        self._run_of: dict[ObjectKey, RunKey] = {}
        self._departed: dict[RunKey, deque[bytes]] = {}
        self._refers_to: dict[RunKey, RunKey] = {}
        self._referrers: dict[RunKey, set[RunKey]] = {}
        self._gone: OrderedDict[str, float] = OrderedDict()
        """By uid: the version at which an object was gone, infinite where it can never come back."""
        self._listed: set[Kind] = set()
        self._unknown: set[Kind] = set()

    # --- Reading -----------------------------------------------------------------------------------------------------

    def get(self, key: ObjectKey) -> Manifest | None:
        """Return an object, or None."""
        entry = self._entries.get((key.api_version, key.kind), {}).get((key.namespace, key.name))
        return _unpack(entry.packed) if entry is not None else None

    def children(self, run: RunKey) -> list[Manifest]:
        """Return everything that bears the run's label, whoever made it."""
        found = []
        for key in sorted(self._of_run.get(run, ())):
            manifest = self.get(key)
            if manifest is not None:
                found.append(manifest)
        return found

    def departed(self, run: RunKey) -> list[Manifest]:
        """Return the last states of pods that were taken or deleted: they say so, and go at the same moment."""
        return [_unpack(packed) for packed in self._departed.get(run, ())]

    def referrers(self, run: RunKey) -> list[RunKey]:
        """Return the runs whose spec refers to a run, which need not exist."""
        return sorted(self._referrers.get(run, ()))

    def runs(self) -> list[RunKey]:
        """Return the key of every run."""
        return list(self._entries.get(TRAINING_RUN, {}))

    def is_listed(self, kind: Kind) -> bool:
        """Return whether a kind was listed once in full."""
        return kind in self._listed

    def is_served(self, kind: Kind) -> bool:
        """Return whether the cluster knew the kind when it was listed last."""
        return kind in self._listed and kind not in self._unknown

    def count(self, kind: Kind) -> int:
        """Return how many objects of a kind are known."""
        return len(self._entries.get(kind, {}))

    # --- Writing -----------------------------------------------------------------------------------------------------

    def put(self, manifest: Manifest, *, own: bool = False) -> None:
        """Take an object as it was read; an older version than the known one changes nothing.

        `own`: it is the answer to a write of ours, which is no news to who wrote it.
        """
        key, metadata = ObjectKey.of(manifest), manifest["metadata"]
        kind = (key.api_version, key.kind)
        uid, version = metadata["uid"], int(metadata["resourceVersion"])
        known = self._entries.setdefault(kind, {}).get((key.namespace, key.name))
        # Versions of one kind can be compared, also those of two objects that bore the name one after the other.
        if version <= self._gone.get(uid, 0) or (known is not None and known.version >= version):
            return
        run = _run_of(key, manifest)
        if known is not None and run != self._run_of.get(key, run):
            self._remove(key)
            known = None
        if run is None:
            return
        wakes = fingerprint(manifest)
        self._entries[kind][key.namespace, key.name] = _Entry(uid, version, wakes, _pack(manifest))
        if kind == TRAINING_RUN:
            self._note_reference(run, manifest)
            self._tell_referrers(run)
        else:
            self._run_of[key] = run
            self._of_run.setdefault(run, set()).add(key)
        if not own and (known is None or (known.uid, known.wakes) != (uid, wakes)):
            self._on_change(run, patience_seconds(manifest, is_new=known is None))

    def drop(self, manifest: Manifest) -> None:
        """Take an object as gone, given its last state: deleted, or without the label that the watch selects by."""
        key, uid = ObjectKey.of(manifest), manifest["metadata"]["uid"]
        self._bury(uid, version=int(manifest["metadata"]["resourceVersion"]))
        run = _run_of(key, manifest)
        if run in self._entries.get(TRAINING_RUN, {}) and (key.api_version, key.kind) == POD:
            self._remember(run, manifest)
        known = self._entries.get((key.api_version, key.kind), {}).get((key.namespace, key.name))
        if known is not None and known.uid == uid:
            self._remove(key)

    def forget(self, key: ObjectKey) -> None:
        """Take an object as gone, because a read of it found nothing."""
        known = self._entries.get((key.api_version, key.kind), {}).get((key.namespace, key.name))
        if known is not None:
            self._bury(known.uid, version=math.inf)
            self._remove(key)

    def retain(self, kind: Kind, uids: Container[str], *, version: str | None) -> None:
        """Take the whole list of a kind as put: what is not in it, hence of no such uid, and not newer is gone.

        `version` is the list's, None where the cluster does not know the kind any more: no object of it can be newer.
        """
        limit = math.inf if version is None else int(version)
        for (namespace, name), entry in list(self._entries.get(kind, {}).items()):
            if entry.uid not in uids and entry.version <= limit:
                self._bury(entry.uid, version=limit)
                self._remove(ObjectKey(*kind, namespace, name))
        self._listed.add(kind)
        if version is None:
            self._unknown.add(kind)
        else:
            self._unknown.discard(kind)

    def _remember(self, run: RunKey, pod: Manifest) -> None:
        """Keep the last state of a pod that the cluster took, and of each attempt's first that somebody deleted.

        The others of its gang are deleted because of that one, and are many.
        """
        departed = self.departed(run)
        first = not any(_attempt_of(known) == _attempt_of(pod) for known in departed)
        if _was_disrupted(pod) or (first and is_being_deleted(pod)):
            self._departed.setdefault(run, deque(maxlen=_DEPARTED)).append(_pack(pod))

    def _bury(self, uid: str, *, version: float) -> None:
        """Remember the dead: a late answer to a write of ours must not bring one back."""
        self._gone[uid] = max(version, self._gone.pop(uid, 0))
        if len(self._gone) > _TOMBSTONES:
            self._gone.popitem(last=False)

    def _remove(self, key: ObjectKey) -> None:
        del self._entries[key.api_version, key.kind][key.namespace, key.name]
        run = self._run_of.pop(key, None)
        if (key.api_version, key.kind) == TRAINING_RUN:
            run = (key.namespace, key.name)
            self._departed.pop(run, None)
            self._note_reference(run, None)
            self._tell_referrers(run)
        if run is None:
            return
        owned = self._of_run.get(run)
        if owned is not None:
            owned.discard(key)
            if not owned:
                del self._of_run[run]
        self._on_change(run, PROMPT_SECONDS)

    def _note_reference(self, run: RunKey, manifest: Manifest | None) -> None:
        known = self._refers_to.pop(run, None)
        if known is not None:
            self._referrers[known].discard(run)
            if not self._referrers[known]:
                del self._referrers[known]
        reference = (((manifest or {}).get("spec") or {}).get("model") or {}).get("runRef")
        if reference is not None:
            refers_to = (run[0], str(reference.get("name")))
            self._refers_to[run] = refers_to
            self._referrers.setdefault(refers_to, set()).add(run)

    def _tell_referrers(self, run: RunKey) -> None:
        """Whoever writes it: what was no news for the run itself is what others wait for."""
        for referrer in self._referrers.get(run, ()):
            self._on_change(referrer, PROMPT_SECONDS)


def _run_of(key: ObjectKey, manifest: Manifest) -> RunKey | None:
    """Return the run that an object belongs to: itself, or by its label."""
    if (key.api_version, key.kind) == TRAINING_RUN:
        return key.namespace, key.name
    name = (manifest["metadata"].get("labels") or {}).get(labels.RUN)
    return (key.namespace, name) if name is not None else None


def _was_disrupted(pod: Manifest) -> bool:
    condition = pod_condition(pod, "DisruptionTarget")
    return condition is not None and condition.get("status") == "True"


def _attempt_of(pod: Manifest) -> str | None:
    return (pod["metadata"].get("labels") or {}).get(labels.ATTEMPT)


def _pack(manifest: Manifest) -> bytes:
    metadata = {name: value for name, value in manifest["metadata"].items() if name != "managedFields"}
    kept = {**manifest, "metadata": metadata}
    if (manifest["apiVersion"], manifest["kind"]) == POD and "spec" in manifest:
        # What a pod is to run is its job's business; where it runs, and how it is, are its own.
        kept["spec"] = {name: value for name, value in manifest["spec"].items() if name == "nodeName"}
    return zlib.compress(orjson.dumps(kept), level=1, wbits=_WINDOW_BITS)


def _unpack(packed: bytes) -> Manifest:
    manifest: Manifest = orjson.loads(zlib.decompress(packed))
    return manifest
