"""`Cluster`: what the operator asks of a Kubernetes API server, as a port, and the errors that come back.

It owns the calls' meaning; it must not know how they travel, nor decide when one is due.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from posttrain.plan.types import Manifest, ObjectRef

MANAGER = "posttrain"
"""Field manager of the children and of every part of a status but `progress`."""
PROGRESS_MANAGER = "posttrain-progress"
"""Field manager of `status.progress`, which every replica's progress server writes."""


@dataclass(frozen=True, order=True)
class ObjectKey:
    """Names one object of the cluster; `namespace` is empty for a cluster-scoped kind."""

    api_version: str
    kind: str
    namespace: str
    name: str

    @classmethod
    def of(cls, manifest: Mapping[str, Any]) -> ObjectKey:
        """Return the key of a manifest's object."""
        metadata = manifest["metadata"]
        return cls(manifest["apiVersion"], manifest["kind"], metadata.get("namespace") or "", metadata["name"])

    @property
    def ref(self) -> ObjectRef:
        """The same without its namespace, as plans name objects."""
        return ObjectRef(self.api_version, self.kind, self.name)


@dataclass(frozen=True, kw_only=True)
class ObjectList:
    """The answer to a LIST, or a part of it: the objects, and the version that a watch goes on from."""

    items: list[Manifest]
    resource_version: str


@dataclass(frozen=True, kw_only=True)
class WatchEvent:
    """One event of a watch; BOOKMARK carries a version and no object."""

    type: Literal["ADDED", "MODIFIED", "DELETED", "BOOKMARK"]
    object: Manifest


class ClusterError(Exception):
    """The API server did not do what it was asked to."""


class NotFound(ClusterError):
    """404: there is no such object, or no such kind."""


class AlreadyExists(ClusterError):
    """409: an object of that name is there already."""


class Conflict(ClusterError):
    """409: the object is not the one that was read (another uid), or it changed since (another resourceVersion)."""


class Rejected(ClusterError):
    """400, 403 or 422 to a write: a schema, webhook, quota or right refuses it, and will again."""


class Expired(ClusterError):
    """410: a watch cannot go on from that version; list again."""


class Unavailable(ClusterError):
    """No answer, 401, 429 or 5xx: the same request may succeed later."""

    def __init__(self, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class InternalError(Unavailable):
    """500 or 504: the server could not do this one request; a webhook that it has to ask does not answer, for one."""


class Cluster(Protocol):
    """The API server. Every call has a time limit and may raise `Unavailable`."""

    async def create(self, manifest: Manifest) -> Manifest:
        """Create an object and return it as stored. For a review, return the answer.

        Raises:
            AlreadyExists: an object of that name is there.
            Rejected: it is refused.
        """

    async def apply(self, manifest: Manifest, *, uid: str) -> Manifest:
        """Apply the complete intent to the object that has this uid (server-side apply), and return it as stored.

        Raises:
            Conflict: another object bears the name now.
            NotFound: it is gone.
            Rejected: it is refused.
        """

    async def apply_status(self, manifest: Manifest, *, manager: str) -> Manifest:
        """Apply one manager's part of a status; `metadata` names the uid and the resourceVersion it was computed from.

        Raises:
            Conflict: the object changed since, or is another one.
            NotFound: it is gone.
            Rejected: it is refused.
        """

    async def patch(self, key: ObjectKey, body: Mapping[str, Any], *, subresource: str = "") -> Manifest:
        """Merge-patch an object, or a subresource of it, and return it as stored.

        Raises:
            Conflict: `body` names a uid or resourceVersion that is not the object's.
            NotFound: it is gone.
            Rejected: it is refused.
        """

    async def delete(self, key: ObjectKey, *, uid: str) -> None:
        """Delete the object that has this uid; what it owns goes after it. One that is gone already is no error.

        Raises:
            Conflict: another object bears the name now.
        """

    async def get(self, key: ObjectKey) -> Manifest:
        """Return an object as it stands.

        Raises:
            NotFound: there is none.
        """

    async def list(
        self, api_version: str, kind: str, *, namespace: str = "", label_selector: str = "", field_selector: str = ""
    ) -> ObjectList:
        """Return the objects of a kind, of all namespaces where none is given.

        Raises:
            NotFound: the cluster does not know the kind.
        """

    def pages(self, api_version: str, kind: str, *, label_selector: str = "") -> AsyncIterator[ObjectList]:
        """Yield the objects of a kind of all namespaces part by part, each of the same version.

        At least one part comes. So many objects need not be in memory all at once.

        Raises:
            NotFound: the cluster does not know the kind.
            Expired: the version has become too old before the last part.
        """

    def watch(
        self, api_version: str, kind: str, *, resource_version: str, label_selector: str = ""
    ) -> AsyncIterator[WatchEvent]:
        """Yield what happens after a version, until the server ends the watch.

        Raises:
            Expired: the version is too old.
        """
