"""The progress server of a local run: what a workload posts goes into the resource's `status.progress`.

It owns the HTTP side (address, tokens, limits) and nothing else: what a report means is `posttrain.plan.progress`'s.
"""

from __future__ import annotations

import secrets
import sys
from collections.abc import Callable
from datetime import datetime
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from typing import Any

from posttrain.contract.facts import BODY_MAX_BYTES, FactsReport
from posttrain.contract.reports import ENDPOINTS, Endpoint, parse_report
from posttrain.local.store import RunStore
from posttrain.plan.names import resource_path
from posttrain.plan.progress import facts_reply, next_progress

_ADDRESS = "127.0.0.1"
_DRAINED_BYTES = 1024 * 1024
_SOCKET_SECONDS = 10.0
_POLL_SECONDS = 0.1


class ProgressServer:
    """Serves one run on a free port of this machine alone, from threads of its own, until it is closed."""

    def __init__(self, store: RunStore, *, notify: Callable[[], None], clock: Callable[[], datetime]) -> None:
        self._store = store
        self._notify = notify
        self._clock = clock
        self._attempts: dict[str, int] = {}
        self._attempts_lock = Lock()
        metadata = store.run.metadata
        path = resource_path(namespace=metadata.namespace, run=metadata.name)
        self._endpoints: dict[str, Endpoint] = {f"/{path}/{endpoint}": endpoint for endpoint in ENDPOINTS}
        self._http = _Server((_ADDRESS, 0), partial(_Handler, self))
        self._thread = Thread(
            target=self._http.serve_forever, args=(_POLL_SECONDS,), name="progress-server", daemon=True
        )
        self._thread.start()

    @property
    def url(self) -> str:
        """The server's address, without a path."""
        return f"http://{_ADDRESS}:{self._http.server_address[1]}"

    def issue(self, *, attempt: int) -> str:
        """Return a token with which a pod of that attempt may report."""
        token = secrets.token_urlsafe(32)
        with self._attempts_lock:
            self._attempts[token] = attempt
        return token

    def revoke(self, token: str) -> None:
        """Take the token back: its pod has ended."""
        with self._attempts_lock:
            self._attempts.pop(token, None)

    def close(self) -> None:
        """Stop serving."""
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def attempt_of(self, authorization: str) -> int | None:
        """Return the attempt that an Authorization header proves, or None."""
        scheme, _, token = authorization.partition(" ")
        with self._attempts_lock:
            issued = list(self._attempts.items())
        if scheme.lower() != "bearer":
            return None
        given = token.strip().encode()
        return next((attempt for known, attempt in issued if secrets.compare_digest(known.encode(), given)), None)

    def endpoint_of(self, path: str) -> Endpoint | None:
        """Return what is posted to that path, or None."""
        return self._endpoints.get(path)

    def take(self, body: bytes, *, endpoint: Endpoint, attempt: int) -> str:
        """Fold a body into the run's progress and return the answer.

        Raises:
            ValueError: the body is not what belongs to that endpoint; the message says why.
        """
        report = parse_report(body, endpoint=endpoint, attempt=attempt)
        if report is None:
            return "{}"
        facts = isinstance(report, FactsReport) and report.facts
        # What is acknowledged is never sent again: it must be on disk before.
        progress = self._store.write_progress(
            lambda current: next_progress(current, report, received_at=self._clock()), durable=bool(facts)
        )
        self._notify()
        if isinstance(report, FactsReport):
            return facts_reply(progress, report).model_dump_json(exclude_none=True)
        return "{}"


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Pass over a client that went away: it sends again, or the next process does."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    timeout = _SOCKET_SECONDS
    server_version = "posttrain"

    def __init__(self, progress: ProgressServer, *args: object) -> None:
        self._progress = progress
        super().__init__(*args)  # type: ignore[arg-type]  # request, client_address, server: socketserver's

    def do_POST(self) -> None:
        """Answer a post."""
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            self._answer(HTTPStatus.LENGTH_REQUIRED, "the request has no Content-Length")
            return
        if int(length) > BODY_MAX_BYTES:
            # A client that is still sending would see a closed connection instead of the answer.
            self.rfile.read(min(int(length), _DRAINED_BYTES))
            self._answer(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"the body may have {BODY_MAX_BYTES} bytes")
            return
        body = self.rfile.read(int(length))
        endpoint = self._progress.endpoint_of(self.path)
        if endpoint is None:
            self._answer(HTTPStatus.NOT_FOUND, f"nothing is posted to {self.path}")
            return
        attempt = self._progress.attempt_of(self.headers.get("Authorization", ""))
        if attempt is None:
            self._answer(HTTPStatus.UNAUTHORIZED, "the bearer token is missing, wrong or of a pod that has ended")
            return
        try:
            answer = self._progress.take(body, endpoint=endpoint, attempt=attempt)
        except ValueError as error:
            self._answer(HTTPStatus.BAD_REQUEST, str(error))
            return
        self._send(HTTPStatus.OK, "application/json", answer)

    def _answer(self, status: HTTPStatus, text: str) -> None:
        self._send(status, "text/plain; charset=utf-8", text + "\n")

    def _send(self, status: HTTPStatus, content_type: str, text: str) -> None:
        content = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(content)))
        if status is HTTPStatus.UNAUTHORIZED:
            self.send_header("WWW-Authenticate", "Bearer")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Write nothing: a terminal shows the run."""
