"""A progress server for tests: it folds nothing, it keeps and acknowledges."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from posttrain.contract.facts import AcknowledgedSource, Fact, FactsReply, FactsReport, is_urgent


class FactsServer:
    """Takes reports on 127.0.0.1 and acknowledges each source as far as its facts follow on each other.

    With `hold_seconds` it acknowledges only what is urgent or waited for, and asks to wait so long with the rest.
    """

    def __init__(self, *, status: int = 200, hold_seconds: float | None = None) -> None:
        self.status = status
        self.hold_seconds = hold_seconds
        self.reports: list[FactsReport] = []
        self.headers: list[dict[str, str]] = []
        self.statuses: list[dict[str, Any]] = []
        """Bodies of what came to `status_url`."""
        self.taken: dict[tuple[int, str], list[Fact]] = {}
        self.changed = threading.Condition()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                reply = b""
                if outer.status == 200:
                    to_status = self.path.endswith("/status")
                    reply = outer._take_status(body) if to_status else outer._take(body, dict(self.headers))
                self.send_response(outer.status)
                self.send_header("Content-Length", str(len(reply)))
                self.end_headers()
                self.wfile.write(reply)

            def log_message(self, *_: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.status_url = f"http://127.0.0.1:{self._http.server_address[1]}/status"
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}/facts"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def _take_status(self, body: bytes) -> bytes:
        with self.changed:
            self.statuses.append(json.loads(body)["trainerStatus"])
            self.changed.notify_all()
        return b"{}"

    def _take(self, body: bytes, headers: dict[str, str]) -> bytes:
        report = FactsReport.model_validate_json(body)
        with self.changed:
            self.reports.append(report)
            self.headers.append(headers)
            urgent = report.waiting or any(is_urgent(fact.body) for fact in report.facts)
            if self.hold_seconds is not None and report.facts and not urgent:
                self.changed.notify_all()
                return FactsReply(retry_after_seconds=self.hold_seconds).model_dump_json().encode()
            for fact in report.facts:
                known = self.taken.setdefault((fact.attempt, fact.source), [])
                if fact.seq == len(known) + 1:
                    known.append(fact)
            self.changed.notify_all()
            sources = {(fact.attempt, fact.source) for fact in report.facts}
            reached = (AcknowledgedSource(attempt=a, source=s, seq=len(self.taken[a, s])) for a, s in sorted(sources))
            return FactsReply(acknowledged=tuple(reached)).model_dump_json().encode()

    def wait_for(self, condition: Any, *, seconds: float = 20.0) -> bool:
        """Wait until `condition(self)` holds; tell whether it did in time."""
        with self.changed:
            return bool(self.changed.wait_for(lambda: condition(self), timeout=seconds))

    def close(self) -> None:
        """Refuse connections from now on."""
        self._http.shutdown()
        self._http.server_close()
