"""`FakeCluster`: an API server in memory, for tests of what stands on the `Cluster` port.

It owns what a real one does that decisions depend on: identity, versions, field ownership, garbage collection, watches.
It must not validate resources, nor play any controller: `put` states what a controller would have written.

Lists are atomic, as in a schema without list types. As on a real server an object that was created belongs to
(manager, Update) and what is applied to (manager, Apply): a field of both stays when the later apply leaves it out.
"""

from __future__ import annotations

import asyncio
import re
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from posttrain.control.kinds import PLURALS, TOKEN_REVIEW, Kind
from posttrain.control.port import (
    MANAGER,
    AlreadyExists,
    Conflict,
    Expired,
    NotFound,
    ObjectKey,
    ObjectList,
    Rejected,
    WatchEvent,
)
from posttrain.plan.types import Manifest
from tests.support.builders import T0, rfc3339

Path = tuple[str, ...]
Owner = tuple[str, str, str]
"""Manager, operation, subresource: an entry of managedFields."""

PAGE = 2
"""Objects in a part of a list that is read part by part."""

_SYSTEM = ("uid", "resourceVersion", "generation", "creationTimestamp", "deletionTimestamp", "managedFields")
_IDENTITY = {("apiVersion",), ("kind",), ("metadata", "name"), ("metadata", "namespace")}
_POD = "authentication.kubernetes.io/pod-"


@dataclass
class _Stored:
    body: Manifest
    owners: dict[Owner, set[Path]] = field(default_factory=dict)

    @property
    def metadata(self) -> dict[str, Any]:
        return self.body["metadata"]

    def read(self) -> Manifest:
        shown = deepcopy(self.body)
        entries = [
            {"manager": m, "operation": o, "subresource": s, "fieldsType": "FieldsV1", "fieldsV1": _to_fields(paths)}
            for (m, o, s), paths in sorted(self.owners.items())
        ]
        shown["metadata"]["managedFields"] = [{k: v for k, v in entry.items() if v != ""} for entry in entries]
        return shown


@dataclass(frozen=True)
class _Change:
    version: int
    before: Manifest | None
    after: Manifest | None


class FakeCluster:
    """The port, and beside it what a test arranges and looks at."""

    def __init__(self, *, missing_kinds: frozenset[Kind] = frozenset(), clock: Callable[[], datetime] = lambda: T0):
        self.clock = clock
        self.missing_kinds = missing_kinds
        """Kinds that this cluster does not know: an operator that is not installed."""
        self.tokens: dict[str, dict[str, Any]] = {}
        """The status that a TokenReview of a token is answered with; only for one of its `audiences`."""
        self.requests: list[tuple[str, ObjectKey]] = []
        """Every call with its object; a list or watch names none."""
        self._objects: dict[ObjectKey, _Stored] = {}
        self._failures: defaultdict[str, deque[Exception]] = defaultdict(deque)
        self._version = self._oldest = 100
        self._made = 0
        self._changes: list[_Change] = []
        self._watchers: set[asyncio.Queue[str]] = set()

    # --- What a test arranges ----------------------------------------------------------------------------------------

    def put(self, manifest: Manifest) -> Manifest:
        """Store an object as it is given, status, uid and deletionTimestamp included, in place of one of that name."""
        key = ObjectKey.of(manifest)
        known = self._objects.get(key)
        body = deepcopy(manifest)
        body["metadata"].pop("managedFields", None)
        stored = _Stored(body, dict(known.owners) if known else {})
        for name, value in (known.metadata if known else self._identity()).items():
            if name in _SYSTEM and name != "deletionTimestamp":
                stored.metadata.setdefault(name, value)
        return self._store(key, stored, before=known.body if known else None)

    def put_status(self, key: ObjectKey, status: Mapping[str, Any]) -> Manifest:
        """Replace the whole status of an object, as its controller does."""
        return self.put({**deepcopy(self._objects[key].body), "status": deepcopy(dict(status))})

    def remove(self, key: ObjectKey) -> None:
        """Delete an object, as somebody else does, and what it owns with it."""
        self._delete(key)

    def add_token(self, token: str, *, pod: Manifest, audience: str) -> None:
        """Know a token that is bound to a pod."""
        metadata = pod["metadata"]
        extra = {f"{_POD}name": [metadata["name"]], f"{_POD}uid": [metadata["uid"]]}
        user = {"username": f"system:serviceaccount:{metadata['namespace']}:default", "extra": extra}
        self.tokens[token] = {"authenticated": True, "user": user, "audiences": [audience]}

    def fail(self, method: str, *errors: Exception) -> None:
        """Answer the next calls of a method with these errors, one each."""
        self._failures[method].extend(errors)

    def cut_watches(self) -> None:
        """End every open watch, as a server does after some minutes."""
        self._tell("cut")

    def expire_watches(self) -> None:
        """Forget what happened so far: no watch can go on from before now."""
        self._oldest = self._version
        self._changes.clear()
        self._tell("change")

    def send_bookmarks(self) -> None:
        """Send every open watch a bookmark."""
        self._tell("bookmark")

    def objects(self, kind: Kind) -> list[Manifest]:
        """Return every object of a kind, by name."""
        found = sorted(key for key in self._objects if (key.api_version, key.kind) == kind)
        return [self._objects[key].read() for key in found]

    def count(self, method: str, kind: Kind | None = None) -> int:
        """Return how many calls of a method there were."""
        return sum(m == method and kind in (None, (k.api_version, k.kind)) for m, k in self.requests)

    def read(self, kind: Kind, *, label_selector: str = "") -> ObjectList:
        """Return what a LIST of a kind would answer; no request is counted."""
        items = [item for item in self.objects(kind) if _selects(label_selector, item["metadata"].get("labels") or {})]
        return ObjectList(items=items, resource_version=str(self._version))

    def events(self, kind: Kind, *, after: int, label_selector: str = "") -> list[WatchEvent]:
        """Return what a watch of a kind from that version on would have said by now; no request is counted."""
        changes = (change for change in self._changes if change.version > after)
        found = (_event(change, kind=kind, label_selector=label_selector) for change in changes)
        return [event for event in found if event is not None]

    # --- The port ----------------------------------------------------------------------------------------------------

    async def create(self, manifest: Manifest) -> Manifest:
        if (manifest["apiVersion"], manifest["kind"]) == TOKEN_REVIEW:
            await self._begin("create", ObjectKey(*TOKEN_REVIEW, "", ""))
            return {**deepcopy(manifest), "status": self._review(manifest["spec"])}
        key = ObjectKey.of(manifest)
        await self._begin("create", key)
        if key in self._objects:
            raise AlreadyExists(f"{key.kind} {key.name} already exists")
        body = deepcopy({name: value for name, value in manifest.items() if name != "status"})
        body["metadata"] = {k: v for k, v in body["metadata"].items() if k not in _SYSTEM} | self._identity()
        made = self._store(key, _Stored(body, {(MANAGER, "Update", ""): _own_paths(body)}), before=None)
        owners = body["metadata"].get("ownerReferences") or ()
        if owners and not any(self._by_uid(owner["uid"]) for owner in owners):
            self._remove(key)  # its owner went before it came: the garbage collector takes it
        return made

    async def apply(self, manifest: Manifest, *, uid: str) -> Manifest:
        key = ObjectKey.of(manifest)
        await self._begin("apply", key)
        stored = self._checked(key, {"uid": uid})
        intent = deepcopy({name: value for name, value in manifest.items() if name != "status"})
        intent["metadata"] = {k: v for k, v in intent["metadata"].items() if k not in _SYSTEM}
        return self._apply(key, stored, intent, owner=(MANAGER, "Apply", ""))

    async def apply_status(self, manifest: Manifest, *, manager: str) -> Manifest:
        key = ObjectKey.of(manifest)
        await self._begin("apply_status", key)
        stored = self._checked(key, manifest["metadata"])
        intent = {"status": deepcopy(manifest.get("status") or {})}
        return self._apply(key, stored, intent, owner=(manager, "Apply", "status"))

    async def patch(self, key: ObjectKey, body: Mapping[str, Any], *, subresource: str = "") -> Manifest:
        await self._begin("patch", key)
        stored = self._checked(key, body.get("metadata") or {})
        part = {name: value for name, value in body.items() if (name == "status") == (subresource == "status")}
        part["metadata"] = {k: v for k, v in (part.get("metadata") or {}).items() if k not in _SYSTEM}
        owner = (MANAGER, "Update", subresource)
        paths = _own_paths(part)
        owners = {known: held - paths for known, held in stored.owners.items()}
        owners[owner] = owners.get(owner, set()) | paths
        return self._store(key, _Stored(_merge_patch(stored.body, part), owners), before=stored.body)

    async def delete(self, key: ObjectKey, *, uid: str) -> None:
        await self._begin("delete", key)
        if key in self._objects:
            self._checked(key, {"uid": uid})
            self._delete(key)

    async def get(self, key: ObjectKey) -> Manifest:
        await self._begin("get", key)
        return self._checked(key, {}).read()

    async def list(
        self, api_version: str, kind: str, *, namespace: str = "", label_selector: str = "", field_selector: str = ""
    ) -> ObjectList:
        await self._begin("list", ObjectKey(api_version, kind, namespace, ""))
        items = [
            item
            for item in self.objects((api_version, kind))
            if namespace in ("", item["metadata"].get("namespace"))
            and _selects(label_selector, item["metadata"].get("labels") or {})
            and _selects(field_selector, _Fields(item))
        ]
        return ObjectList(items=items, resource_version=str(self._version))

    async def pages(self, api_version: str, kind: str, *, label_selector: str = "") -> AsyncIterator[ObjectList]:
        found = await self.list(api_version, kind, label_selector=label_selector)
        for start in range(0, max(len(found.items), 1), PAGE):
            yield replace(found, items=found.items[start : start + PAGE])
            await asyncio.sleep(0)

    async def watch(
        self, api_version: str, kind: str, *, resource_version: str, label_selector: str = ""
    ) -> AsyncIterator[WatchEvent]:
        await self._begin("watch", ObjectKey(api_version, kind, "", ""))
        seen = int(resource_version)
        news: asyncio.Queue[str] = asyncio.Queue()
        self._watchers.add(news)
        try:
            what = "change"
            while what != "cut":
                if seen < self._oldest:
                    raise Expired(f"too old resource version: {seen} ({self._oldest})")
                for change in [c for c in self._changes if c.version > seen]:
                    seen = change.version
                    event = _event(change, kind=(api_version, kind), label_selector=label_selector)
                    if event is not None:
                        yield event
                if what == "bookmark":
                    metadata = {"resourceVersion": str(self._version)}
                    bookmark = {"apiVersion": api_version, "kind": kind, "metadata": metadata}
                    yield WatchEvent(type="BOOKMARK", object=bookmark)
                what = await news.get()
        finally:
            self._watchers.discard(news)

    # --- Inside ------------------------------------------------------------------------------------------------------

    async def _begin(self, method: str, key: ObjectKey) -> None:
        self.requests.append((method, key))
        await asyncio.sleep(0)  # others run meanwhile, as they do while a request travels
        if self._failures[method]:
            raise self._failures[method].popleft()
        kind = (key.api_version, key.kind)
        if kind not in PLURALS or kind in self.missing_kinds:
            raise NotFound(f"the server has no {key.api_version} {key.kind}")

    def _identity(self) -> dict[str, Any]:
        self._made += 1
        uid = f"00000000-0000-4000-8000-{self._made:012d}"
        return {"uid": uid, "generation": 1, "creationTimestamp": rfc3339(self.clock())}

    def _checked(self, key: ObjectKey, expected: Mapping[str, Any]) -> _Stored:
        stored = self._objects.get(key)
        if stored is None:
            raise NotFound(f"{key.kind} {key.name} not found")
        for name in ("uid", "resourceVersion"):
            if expected.get(name) not in (None, stored.metadata[name]):
                raise Conflict(f"{key.kind} {key.name}: {name} is {stored.metadata[name]}, not {expected[name]}")
        return stored

    def _apply(self, key: ObjectKey, stored: _Stored, intent: Manifest, *, owner: Owner) -> Manifest:
        paths = _own_paths(intent)
        others = {known: held for known, held in stored.owners.items() if known != owner}
        body = deepcopy(stored.body)
        for path in stored.owners.get(owner, set()) - paths - set().union(*others.values()):
            _drop(body, path)
        body = _merge(body, intent)
        changed = {path for path in paths if _at(stored.body, path) != _at(body, path)}
        owners = {known: held - changed for known, held in others.items()}  # forced
        owners[owner] = paths
        if key.kind == "ConfigMap" and stored.body.get("immutable") and body.get("data") != stored.body.get("data"):
            raise Rejected(f"ConfigMap {key.name}: data: Forbidden: field is immutable when `immutable` is set")
        return self._store(key, _Stored(body, owners), before=stored.body)

    def _store(self, key: ObjectKey, stored: _Stored, *, before: Manifest | None) -> Manifest:
        known = self._objects.get(key)
        if known is not None and (known.body, known.owners) == (stored.body, stored.owners):
            return known.read()
        self._version += 1
        spec_changed = before is not None and before.get("spec") != stored.body.get("spec")
        stored.metadata["generation"] = stored.metadata.get("generation", 1) + spec_changed
        stored.metadata["resourceVersion"] = str(self._version)
        self._objects[key] = stored
        self._record(before, stored.read())
        finalized = (
            before is not None and before["metadata"].get("finalizers") and not stored.metadata.get("finalizers")
        )
        if finalized and stored.metadata.get("deletionTimestamp"):
            self._remove(key)
        return stored.read()

    def _delete(self, key: ObjectKey) -> None:
        stored = self._objects[key]
        if not stored.metadata.get("finalizers"):
            self._remove(key)
        elif "deletionTimestamp" not in stored.metadata:
            body = deepcopy(stored.body)
            body["metadata"]["deletionTimestamp"] = rfc3339(self.clock())
            self._store(key, _Stored(body, stored.owners), before=stored.body)

    def _remove(self, key: ObjectKey) -> None:
        gone = self._objects.pop(key)
        self._version += 1
        gone.metadata["resourceVersion"] = str(self._version)
        self._record(gone.read(), None)
        for child, stored in list(self._objects.items()):
            references = stored.metadata.get("ownerReferences") or ()
            owned = any(reference["uid"] == gone.metadata["uid"] for reference in references)
            if owned and child in self._objects and not any(self._by_uid(r["uid"]) for r in references):
                self._delete(child)

    def _by_uid(self, uid: str) -> _Stored | None:
        return next((stored for stored in self._objects.values() if stored.metadata["uid"] == uid), None)

    def _record(self, before: Manifest | None, after: Manifest | None) -> None:
        self._changes.append(_Change(self._version, deepcopy(before), after))
        self._tell("change")

    def _tell(self, what: str) -> None:
        for news in self._watchers:
            news.put_nowait(what)

    def _review(self, spec: Mapping[str, Any]) -> dict[str, Any]:
        status = deepcopy(self.tokens.get(spec["token"]) or {})
        audiences = [name for name in status.get("audiences") or () if name in spec.get("audiences", ())]
        if not audiences:
            return {"authenticated": False, "error": "invalid bearer token", "user": {}}
        return {**status, "audiences": audiences}


# --- Fields ----------------------------------------------------------------------------------------------------------


class _Fields(Mapping[str, str]):
    """An object's fields by dotted path, as field selectors name them."""

    def __init__(self, manifest: Manifest) -> None:
        self._texts = {".".join(path): str(_at(manifest, path)) for path in _paths(manifest)}

    def __getitem__(self, name: str) -> str:
        return self._texts[name]

    def __iter__(self) -> Any:
        return iter(self._texts)

    def __len__(self) -> int:
        return len(self._texts)


def _selects(selector: str, values: Mapping[str, str]) -> bool:
    for term in filter(None, re.split(r",(?![^(]*\))", selector)):
        if match := re.fullmatch(r"\s*(\S+)\s+(in|notin)\s+\(([^)]*)\)\s*", term):
            listed = {value.strip() for value in match[3].split(",")}
            holds = (values.get(match[1]) in listed) == (match[2] == "in")
        elif match := re.fullmatch(r"\s*([^!=\s]+)\s*(==?|!=)\s*(\S*)\s*", term):
            holds = (values.get(match[1]) == match[3]) == (match[2] != "!=")
        else:
            holds = (term.strip().lstrip("!") in values) != term.strip().startswith("!")
        if not holds:
            return False
    return True


def _event(change: _Change, *, kind: Kind, label_selector: str) -> WatchEvent | None:
    shown = change.after or change.before
    if shown is None or (shown["apiVersion"], shown["kind"]) != kind:
        return None
    was, is_now = (
        side is not None and _selects(label_selector, side["metadata"].get("labels") or {})
        for side in (change.before, change.after)
    )
    if not (was or is_now):
        return None
    return WatchEvent(type=("MODIFIED" if was else "ADDED") if is_now else "DELETED", object=deepcopy(shown))


def _paths(value: Any, prefix: Path = ()) -> set[Path]:
    if not isinstance(value, dict) or (not value and prefix):
        return {prefix}
    return set().union(*(_paths(inner, (*prefix, name)) for name, inner in value.items()))


def _own_paths(body: Manifest) -> set[Path]:
    return {p for p in _paths(body) - _IDENTITY if not (p[0] == "metadata" and (len(p) < 2 or p[1] in _SYSTEM))}


def _at(body: Any, path: Path) -> Any:
    for name in path:
        if not isinstance(body, dict) or name not in body:
            return None
        body = body[name]
    return body


def _drop(body: Manifest, path: Path) -> None:
    parent = _at(body, path[:-1])
    if isinstance(parent, dict):
        parent.pop(path[-1], None)
        if not parent and len(path) > 1:
            _drop(body, path[:-1])


def _merge(body: Any, intent: Any) -> Any:
    if not isinstance(body, dict) or not isinstance(intent, dict):
        return deepcopy(intent)
    return {**body, **{name: _merge(body.get(name), value) for name, value in intent.items()}}


def _merge_patch(body: Any, patch: Any) -> Any:
    if not isinstance(patch, dict):
        return deepcopy(patch)
    known = body if isinstance(body, dict) else {}
    merged = {**known, **{name: _merge_patch(known.get(name), value) for name, value in patch.items()}}
    return {name: value for name, value in merged.items() if not (name in patch and patch[name] is None)}


def _to_fields(paths: set[Path]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for path in sorted(paths):
        inner = fields
        for name in path:
            inner = inner.setdefault(f"f:{name}", {})
    return fields
