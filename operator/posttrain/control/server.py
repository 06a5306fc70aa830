"""The progress server: workloads post to it over TLS, on every replica.

It owns the HTTP side (address, limits, answers) and nothing else: who sends is `authentication`'s, what becomes of a
report `progress`'s.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass
from http import HTTPStatus

import structlog
from aiohttp import web

from posttrain.contract.facts import BODY_MAX_BYTES, FactsReport
from posttrain.contract.reports import ENDPOINTS, Endpoint, parse_report
from posttrain.control.authentication import Authenticator, Forbidden, Unauthenticated
from posttrain.control.certificates import ServingCertificate
from posttrain.control.port import Unavailable
from posttrain.control.progress import ProgressWriter, RunGone
from posttrain.control.rates import RateLimit
from posttrain.plan.names import parse_resource_path

log = structlog.get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class ServerLimits:
    """What one client, and all of them together, may take of a replica."""

    body_bytes: int = BODY_MAX_BYTES
    connections: int = 2048
    request_seconds: float = 10.0
    """For each part of a request to arrive: the handshake, the headers, the body."""
    posts_per_second: float = 20.0
    """Of one run: a gang of 64 nodes sends 6 beats a second, and a step's numbers once a second."""
    posts_burst: int = 100
    reviews_per_second: float = 10.0
    """Of one address: tokens that the API server has to be asked about. A pod's is asked about once a minute."""
    reviews_burst: int = 200
    shutdown_seconds: float = 3.0


class ProgressServer:
    """Serves from `start` to `close`; what it took is in status when `close` returns, if the API server answers."""

    def __init__(
        self,
        *,
        authenticator: Authenticator,
        writer: ProgressWriter,
        certificate: ServingCertificate,
        limits: ServerLimits | None = None,
    ) -> None:
        self._authenticator = authenticator
        self._writer = writer
        self._certificate = certificate
        self._limits = limits or ServerLimits()
        self._rates = RateLimit(per_second=self._limits.posts_per_second, burst=self._limits.posts_burst)
        self._reviews = RateLimit(per_second=self._limits.reviews_per_second, burst=self._limits.reviews_burst)
        self._listener: asyncio.Server | None = None
        self._http: _BoundedServer | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self, *, host: str = "", port: int = 8443) -> None:
        """Listen; port 0 takes a free one.

        Raises:
            OSError: the address is taken.
        """
        limits = self._limits
        self._http = _BoundedServer(self._answer, limits=limits)
        self._listener = await asyncio.get_running_loop().create_server(
            self._http,
            host or None,
            port,
            ssl=self._certificate.context,
            ssl_handshake_timeout=limits.request_seconds,
            ssl_shutdown_timeout=limits.shutdown_seconds,
        )
        self._tasks = [
            asyncio.create_task(self._certificate.follow(), name="certificate"),
            asyncio.create_task(self._writer.run(), name="progress-writer"),
        ]

    @property
    def port(self) -> int:
        """The port that it listens on."""
        assert self._listener is not None
        port: int = self._listener.sockets[0].getsockname()[1]
        return port

    async def close(self) -> None:
        """Take nothing more, let open requests end, and write what waits."""
        if self._listener is None or self._http is None:
            return
        self._listener.close()
        self._http.pre_shutdown()
        await self._http.shutdown(self._limits.shutdown_seconds)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._writer.close()

    # --- One request -------------------------------------------------------------------------------------------------

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        try:
            return await self._take(request)
        except _Refused as refused:
            return refused.response
        except Unauthenticated as error:
            return _Refused(HTTPStatus.UNAUTHORIZED, str(error)).response
        except Forbidden as error:
            return _Refused(HTTPStatus.FORBIDDEN, str(error)).response
        except RunGone as error:
            return _Refused(HTTPStatus.NOT_FOUND, str(error)).response
        except Unavailable as error:
            return _Refused(HTTPStatus.SERVICE_UNAVAILABLE, str(error), retry_after=error.retry_after or 1.0).response

    async def _take(self, request: web.BaseRequest) -> web.Response:
        namespace, run, endpoint = _parse_address(request)
        token = _bearer_token(request)
        if self._authenticator.needs_review(token, namespace=namespace, run=run):
            text = "sends more than {:g} new tokens a second"
            _admit(self._reviews, request.remote, text, self._limits.reviews_per_second)
        sender = await self._authenticator.prove(token, namespace=namespace, run=run)
        _admit(self._rates, sender.run, "posts more than {:g} times a second", self._limits.posts_per_second)
        body = await self._read_body(request)
        try:
            report = parse_report(body, endpoint=endpoint, attempt=sender.attempt)
        except ValueError as error:
            raise _Refused(HTTPStatus.BAD_REQUEST, str(error)) from None
        if isinstance(report, FactsReport):
            reply = await self._writer.take(sender.run, report, size_bytes=len(body))
            return _json(reply.model_dump_json(exclude_none=True))
        if report is not None:
            # KubeflowCallback posts in the middle of training and waits for the answer.
            self._writer.note(sender.run, report, size_bytes=len(body))
        return _json("{}")

    async def _read_body(self, request: web.BaseRequest) -> bytes:
        limit = self._limits.body_bytes
        body = bytearray()
        if (request.content_length or 0) <= limit:
            try:
                async with asyncio.timeout(self._limits.request_seconds):
                    async for chunk in request.content.iter_any():
                        body += chunk
                        if len(body) > limit:
                            break
                    else:
                        return bytes(body)
            except TimeoutError:
                text = f"the body did not arrive within {self._limits.request_seconds:g} s"
                raise _Refused(HTTPStatus.REQUEST_TIMEOUT, text) from None
        raise _Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"the body may have {limit} bytes")


class _Refused(Exception):
    """A request that is answered with an error."""

    def __init__(self, status: HTTPStatus, text: str, *, retry_after: float | None = None) -> None:
        super().__init__(text)
        headers = {}
        if retry_after is not None:
            headers["Retry-After"] = str(max(math.ceil(retry_after), 1))
        if status is HTTPStatus.UNAUTHORIZED:
            headers["WWW-Authenticate"] = "Bearer"
        if status is HTTPStatus.METHOD_NOT_ALLOWED:
            headers["Allow"] = "POST"
        self.response = web.Response(status=status, text=text + "\n", headers=headers)


class _BoundedServer(web.Server):
    """Closes a connection beyond the limit at once, and one that sends no whole headers after a while."""

    def __init__(
        self, handler: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]], *, limits: ServerLimits
    ) -> None:
        super().__init__(
            handler,
            keepalive_timeout=limits.request_seconds,
            lingering_time=limits.shutdown_seconds,
            auto_decompress=False,
            access_log=None,
        )
        self._connections_max = limits.connections

    def connection_made(self, handler: web.RequestHandler, transport: asyncio.Transport) -> None:
        super().connection_made(handler, transport)
        if len(self.connections) > self._connections_max:
            log.warning("too many connections: one is closed", limit=self._connections_max)
            transport.abort()


def _admit(rates: RateLimit, sender: Hashable, text: str, most: float) -> None:
    wait = rates.wait_seconds(sender)
    if wait:
        raise _Refused(HTTPStatus.TOO_MANY_REQUESTS, f"{sender} {text.format(most)}", retry_after=wait)


def _parse_address(request: web.BaseRequest) -> tuple[str, str, Endpoint]:
    path, _, last = request.path.rpartition("/")
    named = parse_resource_path(path.removeprefix("/"))
    endpoint = next((known for known in ENDPOINTS if known == last), None)
    if named is None or endpoint is None:
        raise _Refused(HTTPStatus.NOT_FOUND, f"nothing is posted to {request.path[:200]}")
    if request.method != "POST":
        raise _Refused(HTTPStatus.METHOD_NOT_ALLOWED, f"{request.path} takes POST alone")
    return (*named, endpoint)


def _bearer_token(request: web.BaseRequest) -> str:
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not token.strip():
        raise Unauthenticated("the request has no bearer token")
    return token.strip()


def _json(text: str) -> web.Response:
    return web.Response(text=text, content_type="application/json")
