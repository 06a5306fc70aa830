"""A proxy between an operator and the API server of a test cluster: it counts requests, and things go wrong at it.

It owns where a request breaks: before the API server saw it, or after, with the answer lost; it must not know what a
request is for. It runs in a thread of its own, and what a test says to it holds from the next request on.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import threading
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal
from urllib.parse import parse_qs

import aiohttp
from aiohttp import web
from yarl import URL

from tests.cluster.addresses import LOOPBACK
from tests.cluster.cluster import TestCluster

_START_SECONDS = 10.0
_CALL_SECONDS = 10.0
_HOP_BY_HOP = frozenset({"host", "connection", "keep-alive", "transfer-encoding", "content-length", "te", "upgrade"})
_NO_CHILDREN = frozenset({"leases", "tokenreviews"})

When = Literal["before", "after"]
"""Before a request is forwarded, or after the API server's answer, which the operator never gets."""


@dataclass(frozen=True, kw_only=True)
class ApiRequest:
    """One request as it arrived, with the time of `time.monotonic`."""

    method: str
    resource: str
    namespace: str
    name: str
    subresource: str
    is_watch: bool
    at: float

    @property
    def is_write(self) -> bool:
        """Whether it may change a run's objects: not a lease, and not a review."""
        return self.method not in {"GET", "HEAD"} and self.resource not in _NO_CHILDREN

    def __str__(self) -> str:
        what = f"{self.resource}/{self.subresource}" if self.subresource else self.resource
        # An event's name is another one each time.
        return f"{self.method} {what} {self.name if self.resource != 'events' else ''}".rstrip()


Match = Callable[[ApiRequest], bool]


@dataclass(kw_only=True)
class Strike:
    """What happens once, at the first request that matches; that request is lost."""

    match: Match
    when: When
    act: Callable[[], None]
    struck: ApiRequest | None = None


@dataclass(kw_only=True)
class Hold:
    """Keeps the first request that matches from the API server until it is released."""

    match: Match
    loop: asyncio.AbstractEventLoop
    arrived: threading.Event = field(default_factory=threading.Event)
    _released: asyncio.Event = field(default_factory=asyncio.Event)

    def release(self) -> None:
        """Let it go on."""
        self.loop.call_soon_threadsafe(self._released.set)

    async def wait(self) -> None:
        """Tell that it arrived, and wait."""
        self.arrived.set()
        await self._released.wait()


class ApiProxy:
    """One way to the API server. Use it as a context; `kubeconfig` leads through it, with the user of another one."""

    def __init__(self, cluster: TestCluster, *, kubeconfig: Path | None = None, name: str = "api-proxy") -> None:
        self._upstream = cluster.url
        pki = cluster.control_plane.pki
        serving = pki.issue(name, hosts=[LOOPBACK])
        self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._tls.load_cert_chain(serving.certificate, serving.key)
        self._trust = ssl.create_default_context(cafile=str(pki.files.certificate))
        self._config = json.loads((kubeconfig or cluster.kubeconfig).read_text())
        self.kubeconfig = cluster.folder / "kubeconfigs" / name
        self.requests: list[ApiRequest] = []
        self.strikes: list[Strike] = []
        self.refusal: int | None = None
        """The HTTP status that everything is answered with, or None."""
        self.watch_errors: dict[str, Mapping[str, Any]] = {}
        """By resource: the event that every new watch gets and ends with."""
        self.muted: set[str] = set()
        """Resources whose watches stay open and tell nothing."""
        self._holds: list[Hold] = []
        self._watches: dict[web.StreamResponse, tuple[str, asyncio.Transport | None]] = {}
        self._loop = asyncio.new_event_loop()
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._ending = asyncio.Event()
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(),), name=name)

    def __enter__(self) -> ApiProxy:
        self._thread.start()
        assert self._started.wait(_START_SECONDS), "the proxy did not start"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._ending.set)
        self._thread.join()
        self._loop.close()

    # --- What a test says --------------------------------------------------------------------------------------------

    def writes(self, namespace: str | None = None) -> list[ApiRequest]:
        """Return the writes so far, of one namespace or all."""
        return [asked for asked in self.requests if asked.is_write and namespace in (None, asked.namespace)]

    def strike(self, match: Match, *, when: When, act: Callable[[], None]) -> Strike:
        """Act at the next request that matches, which is lost with its answer; it runs in the proxy's thread."""
        strike = Strike(match=match, when=when, act=act)
        self.strikes.append(strike)
        return strike

    def hold(self, match: Match) -> Hold:
        """Hold the next request that matches."""
        hold = Hold(match=match, loop=self._loop)
        self._holds.append(hold)
        return hold

    def freeze(self) -> None:
        """Forward nothing in either direction; connections stay open, and new ones are taken."""
        self._loop.call_soon_threadsafe(self._flowing.clear)

    def thaw(self) -> None:
        """Forward again what is still wanted."""
        self._loop.call_soon_threadsafe(self._flowing.set)

    def cut_watches(self, resource: str) -> int:
        """Reset the connections of a resource's watches; return how many there were."""
        return self._call(self._cut(resource))

    def tell_watches(self, resource: str, event: Mapping[str, Any]) -> int:
        """Send an event down a resource's watches; return how many there were."""
        return self._call(self._tell(resource, event))

    def _call(self, what: Coroutine[Any, Any, int]) -> int:
        return asyncio.run_coroutine_threadsafe(what, self._loop).result(_CALL_SECONDS)

    async def _cut(self, resource: str) -> int:
        found = [transport for watched, transport in self._watches.values() if watched == resource]
        for transport in found:
            if transport is not None:
                transport.abort()
        return len(found)

    async def _tell(self, resource: str, event: Mapping[str, Any]) -> int:
        found = [stream for stream, (watched, _) in self._watches.items() if watched == resource]
        for stream in found:
            await stream.write(_line(event))
        return len(found)

    # --- The way through ---------------------------------------------------------------------------------------------

    async def _serve(self) -> None:
        # Compressed answers pass through as they are.
        connector = aiohttp.TCPConnector(ssl=self._trust, limit=0)
        async with aiohttp.ClientSession(connector=connector, auto_decompress=False) as self._session:
            # Who goes away while a request waits here has withdrawn it.
            runner = web.ServerRunner(
                web.Server(self._answer, handler_cancellation=True, access_log=None), shutdown_timeout=0.1
            )
            await runner.setup()
            site = web.TCPSite(runner, LOOPBACK, 0, ssl_context=self._tls)
            await site.start()
            self._write_kubeconfig(runner.addresses[0][1])
            self._started.set()
            await self._ending.wait()
            self._flowing.set()
            await runner.cleanup()

    def _write_kubeconfig(self, port: int) -> None:
        self._config["clusters"][0]["cluster"]["server"] = f"https://{LOOPBACK}:{port}"
        self.kubeconfig.touch(mode=0o600)
        self.kubeconfig.write_text(json.dumps(self._config))

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        body = await request.read()
        asked = _parse(request, body)
        self.requests.append(asked)
        await self._flowing.wait()
        if self.refusal is not None:
            return web.json_response(_status(self.refusal, "refused by the proxy"), status=self.refusal)
        hold = next((hold for hold in self._holds if hold.match(asked)), None)
        if hold is not None:
            self._holds.remove(hold)
            await hold.wait()
        strike = next((strike for strike in self.strikes if strike.struck is None and strike.match(asked)), None)
        if strike is not None:
            strike.struck = asked
            if strike.when == "before":
                strike.act()
                return _lose(request)
        try:
            forwarding = self._loop.create_task(self._forward(request, body, asked))
            # A write that is on its way gets there, also when who sent it dies: the audit log has its end.
            answer = await (asyncio.shield(forwarding) if asked.is_write else forwarding)
        except aiohttp.ClientError:
            return _lose(request)
        if strike is not None:
            strike.act()
            return _lose(request)
        return answer

    async def _forward(self, request: web.BaseRequest, body: bytes, asked: ApiRequest) -> web.StreamResponse:
        headers = {name: value for name, value in request.headers.items() if name.lower() not in _HOP_BY_HOP}
        timeout = aiohttp.ClientTimeout(total=None)
        url = URL(f"{self._upstream}{request.raw_path}", encoded=True)
        async with self._session.request(
            request.method, url, headers=headers, data=body or None, timeout=timeout
        ) as answer:
            passed = {name: value for name, value in answer.headers.items() if name.lower() not in _HOP_BY_HOP}
            if asked.is_watch and answer.status == 200:
                return await self._relay(request, answer, passed, asked)
            content = await answer.read()
            await self._flowing.wait()
            return web.Response(status=answer.status, headers=passed, body=content)

    async def _relay(
        self, request: web.BaseRequest, answer: aiohttp.ClientResponse, headers: Mapping[str, str], asked: ApiRequest
    ) -> web.StreamResponse:
        """Pass a watch on, whole lines at a time, so that events can be put between them."""
        stream = web.StreamResponse(headers=headers)
        await stream.prepare(request)
        error = self.watch_errors.get(asked.resource)
        if error is not None:
            await stream.write(_line(error))
            return stream
        self._watches[stream] = (asked.resource, request.transport)
        rest = b""
        try:
            async for chunk in answer.content.iter_any():
                await self._flowing.wait()
                whole, newline, rest = (rest + chunk).rpartition(b"\n")
                if newline and asked.resource not in self.muted:
                    await stream.write(whole + newline)
        except ConnectionResetError:
            pass  # whoever watched has gone
        finally:
            del self._watches[stream]
        return stream


def watch_error(code: int, reason: str) -> dict[str, Any]:
    """Return the event with which the API server ends a watch."""
    return {"type": "ERROR", "object": _status(code, reason)}


def _status(code: int, reason: str) -> dict[str, Any]:
    kind = {"kind": "Status", "apiVersion": "v1", "metadata": {}}
    return {**kind, "status": "Failure", "message": reason, "reason": reason, "code": code}


def _line(event: Mapping[str, Any]) -> bytes:
    return json.dumps(event).encode() + b"\n"


def _lose(request: web.BaseRequest) -> web.Response:
    """Break the connection off instead of answering."""
    if request.transport is not None:
        request.transport.abort()
    return web.Response()


def _parse(request: web.BaseRequest, body: bytes) -> ApiRequest:
    path, _, query = request.raw_path.partition("?")
    parts = path.strip("/").split("/")
    rest = parts[2:] if parts[0] == "api" else parts[3:]
    namespace = ""
    if rest[:1] == ["namespaces"] and len(rest) > 2:
        namespace, rest = rest[1], rest[2:]
    resource, name, subresource = (*rest, "", "", "")[:3]
    if request.method == "POST" and body:
        name = (json.loads(body).get("metadata") or {}).get("name", "")
    return ApiRequest(
        method=request.method,
        resource=resource,
        namespace=namespace,
        name=name,
        subresource=subresource,
        is_watch="true" in parse_qs(query).get("watch", ()),
        at=time.monotonic(),
    )
