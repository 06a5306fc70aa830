"""`KubeCluster`: the port to a real API server that `kubernetes.aio` is configured for, over one connection pool.

It owns URLs, content types, time limits and how an HTTP status becomes an error of the port; the library says which
server and who asks. Objects travel as JSON data, not as the library's models: an operator reads few of an object's
fields. It must not decide anything.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import aiohttp
import orjson
from kubernetes.aio import client, config
from kubernetes.aio.client.exceptions import ApiException

import posttrain
from posttrain.control.kinds import Kind, resource_path
from posttrain.control.port import (
    MANAGER,
    AlreadyExists,
    ClusterError,
    Conflict,
    Expired,
    InternalError,
    NotFound,
    ObjectKey,
    ObjectList,
    Rejected,
    Unavailable,
    WatchEvent,
)
from posttrain.plan.types import Manifest

REQUEST_SECONDS = 15.0
_ANSWER_SECONDS = 12
"""Within which the API server is to answer: else it says so (504), also where a webhook has longer to answer itself."""
_CONNECT_SECONDS = 5.0
_WATCH_SECONDS = 290
"""After which the server ends a watch by itself; the next one goes on from the last version."""
_PAGE = 40
"""Objects of a kind that are in memory at once while all are listed: beside the cache's, each takes fifty kilobytes."""
_BUFFER_BYTES = 2**21
"""Of a connection, where an answer waits to be read: the events of a watch come in bursts."""

_JSON = "application/json"
_MERGE_PATCH = "application/merge-patch+json"
_APPLY = "application/apply-patch+yaml"
"""The API server reads JSON under this type too: JSON is YAML."""


async def connect(*, kubeconfig: Path | None, connections: int = 32) -> KubeCluster:
    """Return a connection to the cluster of a kubeconfig, or to the one that this pod runs in.

    Raises:
        Unavailable: neither is there, or it cannot be read; the message says what was looked for.
    """
    configuration = client.Configuration()
    try:
        if kubeconfig is not None:
            await config.load_kube_config(config_file=str(kubeconfig), client_configuration=configuration)
        else:
            config.load_incluster_config(client_configuration=configuration)
    except (config.ConfigException, OSError) as error:
        where = f"the kubeconfig {kubeconfig}" if kubeconfig else "the service account of a pod"
        raise Unavailable(f"no cluster: {where} cannot be read ({error}). Name one with --kubeconfig FILE") from error
    configuration.connection_pool_maxsize = connections
    return KubeCluster(client.ApiClient(configuration))


@dataclass(frozen=True, kw_only=True)
class Connection:
    """How kopf reaches the same API server."""

    configuration: client.Configuration

    def to_kopf(self) -> dict[str, Any]:
        """Return the fields of kopf's ConnectionInfo; a pod's token as it is now, since it is renewed."""
        hook = self.configuration.refresh_api_key_hook
        if hook is not None:
            hook(self.configuration)
        scheme, _, token = str(self.configuration.api_key.get("BearerToken", "")).partition(" ")
        return {
            "server": self.configuration.host,
            "ca_path": self.configuration.ssl_ca_cert,
            "insecure": not self.configuration.verify_ssl,
            "certificate_path": self.configuration.cert_file,
            "private_key_path": self.configuration.key_file,
            "scheme": scheme.capitalize() or None,
            "token": token or None,
        }


class KubeCluster:
    """The API server that an `ApiClient` is configured for."""

    def __init__(self, api: client.ApiClient) -> None:
        """In a running event loop.

        Requests do not go through the client's own session: that one looks for a proxy and a .netrc of this machine's
        in a thread, unless it is told not to, keeps cookies, and takes a quarter longer for each request.
        """
        self._api = api
        configuration = api.configuration
        self._host: str = configuration.host.rstrip("/")
        self._agent = f"posttrain-operator/{posttrain.__version__}"
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=configuration.connection_pool_maxsize, ssl=api.rest_client.ssl_context
            ),
            cookie_jar=aiohttp.DummyCookieJar(),
            proxy=configuration.proxy,
            read_bufsize=_BUFFER_BYTES,
        )

    @property
    def connection(self) -> Connection:
        """How the same API server is reached by others."""
        return Connection(configuration=self._api.configuration)

    async def close(self) -> None:
        """Close every connection."""
        await self._session.close()
        await self._api.close()

    async def create(self, manifest: Manifest) -> Manifest:
        """Create an object; see the port."""
        kind: Kind = (manifest["apiVersion"], manifest["kind"])
        path = resource_path(kind, namespace=manifest["metadata"].get("namespace") or "")
        return await self._request("POST", path, query={"fieldManager": MANAGER}, body=manifest, creates=True)

    async def apply(self, manifest: Manifest, *, uid: str) -> Manifest:
        """Apply an object's complete intent; see the port."""
        intent = {**manifest, "metadata": {**manifest["metadata"], "uid": uid}}
        return await self._apply(intent, subresource="", manager=MANAGER)

    async def apply_status(self, manifest: Manifest, *, manager: str) -> Manifest:
        """Apply a manager's part of a status; see the port."""
        return await self._apply(manifest, subresource="status", manager=manager)

    async def _apply(self, manifest: Manifest, *, subresource: str, manager: str) -> Manifest:
        key = ObjectKey.of(manifest)
        return await self._request(
            "PATCH",
            _path(key, subresource),
            query={"fieldManager": manager, "force": "true"},
            body=manifest,
            content_type=_APPLY,
        )

    async def patch(self, key: ObjectKey, body: Mapping[str, Any], *, subresource: str = "") -> Manifest:
        """Merge-patch an object or a subresource; see the port."""
        query = {"fieldManager": MANAGER}
        return await self._request("PATCH", _path(key, subresource), query=query, body=body, content_type=_MERGE_PATCH)

    async def delete(self, key: ObjectKey, *, uid: str) -> None:
        """Delete an object by its uid; see the port."""
        body = {
            "apiVersion": "v1",
            "kind": "DeleteOptions",
            "preconditions": {"uid": uid},
            "propagationPolicy": "Background",
        }
        try:
            await self._request("DELETE", _path(key, ""), body=body)
        except NotFound:
            return

    async def get(self, key: ObjectKey) -> Manifest:
        """Return an object; see the port."""
        return await self._request("GET", _path(key, ""))

    async def list(
        self, api_version: str, kind: str, *, namespace: str = "", label_selector: str = "", field_selector: str = ""
    ) -> ObjectList:
        """Return the objects of a kind; see the port."""
        query = {"labelSelector": label_selector, "fieldSelector": field_selector}
        items: list[Manifest] = []
        version = ""
        async for page in self._pages((api_version, kind), namespace=namespace, query=query):
            items.extend(page.items)
            version = page.resource_version
        return ObjectList(items=items, resource_version=version)

    def pages(self, api_version: str, kind: str, *, label_selector: str = "") -> AsyncIterator[ObjectList]:
        """Yield the objects of a kind part by part; see the port."""
        return self._pages((api_version, kind), namespace="", query={"labelSelector": label_selector})

    async def _pages(self, kind: Kind, *, namespace: str, query: Mapping[str, str]) -> AsyncIterator[ObjectList]:
        path, token = resource_path(kind, namespace=namespace), ""
        while True:
            page = await self._request("GET", path, query={**query, "limit": str(_PAGE), "continue": token})
            metadata = page["metadata"]
            # Nothing here holds the objects while the next page is asked for.
            yield ObjectList(items=_items(page.pop("items") or (), kind), resource_version=metadata["resourceVersion"])
            token = metadata.get("continue") or ""
            if not token:
                return

    async def watch(
        self, api_version: str, kind: str, *, resource_version: str, label_selector: str = ""
    ) -> AsyncIterator[WatchEvent]:
        """Yield the events of a kind after a version; see the port."""
        query = {
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": resource_version,
            "labelSelector": label_selector,
            "timeoutSeconds": str(_WATCH_SECONDS),
        }
        timeout = aiohttp.ClientTimeout(total=_WATCH_SECONDS + 60, sock_connect=_CONNECT_SECONDS)
        response = await self._open("GET", resource_path((api_version, kind)), query=query, timeout=timeout)
        try:
            async for line in _lines(response.content):
                event: dict[str, Any] = orjson.loads(line)
                if event["type"] == "ERROR":
                    raise _error(event["object"].get("code", 500), event["object"], creates=False, retry_after=None)
                yield WatchEvent(type=event["type"], object=event["object"])
        except (aiohttp.ClientError, TimeoutError, OSError, orjson.JSONDecodeError) as error:
            raise Unavailable(f"the watch of {kind} broke: {_describe(error)}") from error
        finally:
            response.close()

    # --- HTTP --------------------------------------------------------------------------------------------------------

    async def _request(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
        content_type: str = _JSON,
        creates: bool = False,
    ) -> Manifest:
        timeout = aiohttp.ClientTimeout(total=REQUEST_SECONDS, sock_connect=_CONNECT_SECONDS)
        limited = {**(query or {}), "timeout": f"{_ANSWER_SECONDS}s"}
        response = await self._open(
            method, path, query=limited, body=body, content_type=content_type, creates=creates, timeout=timeout
        )
        try:
            answer: Manifest = orjson.loads(await response.read())
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            raise Unavailable(f"{method} {path}: the answer broke off: {_describe(error)}") from error
        return answer

    async def _open(
        self,
        method: str,
        path: str,
        *,
        timeout: aiohttp.ClientTimeout,
        query: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
        content_type: str = _JSON,
        creates: bool = False,
    ) -> aiohttp.ClientResponse:
        headers = {"Accept": _JSON, "Content-Type": content_type, "User-Agent": self._agent}
        chosen = {name: value for name, value in (query or {}).items() if value}
        url = f"{self._host}{path}" + (f"?{urlencode(chosen)}" if chosen else "")
        try:
            await self._api.update_params_for_auth(headers, [], ["BearerToken"], path, method, body)
            response = await self._session.request(
                method,
                url,
                headers=headers,
                data=orjson.dumps(body) if body is not None else None,
                timeout=timeout,
                server_hostname=self._api.configuration.tls_server_name,
            )
            if response.status < 400:
                return response
            text = await response.read()
        except (aiohttp.ClientError, TimeoutError, OSError, ApiException) as error:
            raise Unavailable(f"{method} {path}: {_describe(error)}") from error
        retry_after = response.headers.get("Retry-After", "")
        raise _error(
            response.status,
            _status_of(text),
            creates=creates,
            retry_after=float(retry_after) if retry_after.isdecimal() else None,
        )


def _path(key: ObjectKey, subresource: str) -> str:
    return resource_path((key.api_version, key.kind), namespace=key.namespace, name=key.name, subresource=subresource)


def _items(found: Iterable[Manifest], kind: Kind) -> list[Manifest]:
    """Return the objects of a list, none of which says what it is, without half of each: what nobody reads."""
    for item in found:
        item["metadata"].pop("managedFields", None)
    return [{"apiVersion": kind[0], "kind": kind[1], **item} for item in found]


async def _lines(content: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    """Yield the lines of a stream, however long: an object may have a megabyte, a reader's buffer has not."""
    rest = b""
    async for chunk in content.iter_any():
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if line:
                yield line


def _status_of(text: bytes) -> dict[str, Any]:
    try:
        status = orjson.loads(text)
    except ValueError:
        status = None
    return status if isinstance(status, dict) else {"message": text[:500].decode(errors="replace")}


def _error(code: int, status: Mapping[str, Any], *, creates: bool, retry_after: float | None) -> ClusterError:
    """Return the port's error for an HTTP status; `status` is the API server's Status object."""
    message = str(status.get("message") or status.get("reason") or f"HTTP {code}")
    if code == 404:
        return NotFound(message)
    if code == 409:
        return AlreadyExists(message) if creates and status.get("reason") == "AlreadyExists" else Conflict(message)
    if code == 410:
        return Expired(message)
    if code in (400, 403, 405, 413, 415, 422):
        return Rejected(message)
    kind = InternalError if code in (500, 504) else Unavailable
    return kind(f"{message} (HTTP {code})", retry_after=retry_after)


def _describe(error: BaseException) -> str:
    return str(error) or type(error).__name__
