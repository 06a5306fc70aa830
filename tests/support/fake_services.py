"""E2B and Morph on loopback, as their SDKs speak with them: the machines that they lend are folders of this one.

E2B: its REST API for sandboxes, and the code interpreter's `/execute` with a line of JSON for each event. Morph: its
REST API for instances, with `exec`. By what the SDKs (e2b-code-interpreter 2.11, morphcloud 0.1.116) ask and read; the
services themselves were not seen.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

KEY = "e2b_right"


@dataclass
class FakeService:
    """Both services at one address, with what was asked of them."""

    folder: Path
    url: str = ""
    lent: list[dict[str, Any]] = field(default_factory=list)
    """What each machine was asked for with."""
    ended: list[str] = field(default_factory=list)
    failures: int = 0
    """So many executions are answered with an error of the service, and their machine is gone."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def environ(self) -> dict[str, str]:
        """Return the variables by which both SDKs find it."""
        return {"E2B_API_URL": self.url, "E2B_SANDBOX_URL": self.url, "MORPH_BASE_URL": self.url}

    def lend(self, asked: dict[str, Any]) -> str:
        with self._lock:
            self.lent.append(asked)
            name = f"machine{len(self.lent)}"
        (self.folder / name).mkdir()
        return name

    def end(self, name: str) -> None:
        with self._lock:
            self.ended.append(name)

    def fails(self, name: str) -> bool:
        with self._lock:
            if self.failures == 0:
                return False
            self.failures -= 1
            self.ended.append(name)
            return True

    def run(self, name: str, command: list[str]) -> subprocess.CompletedProcess[str]:
        environ = {"PATH": os.environ["PATH"], "TMPDIR": str(self.folder / name)}
        return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, check=False)

    def answer(self, method: str, path: str, headers: Any, body: dict[str, Any]) -> tuple[int, Any]:
        if headers["X-API-Key"] != KEY and headers["Authorization"] != f"Bearer {KEY}" and path != "/execute":
            return 401, {"code": 401, "message": "no such key", "detail": "no such key"}
        parts = urlsplit(path)
        match method, parts.path.strip("/").split("/"):
            case "POST", ["v2", "sandboxes"]:
                name = self.lend(body)
                return 201, {
                    "templateID": body["templateID"], "sandboxID": name, "clientID": "c", "envdVersion": "0.4.0",
                    "envdAccessToken": f"token of {name}",
                }  # fmt: skip
            case "POST", ["execute"]:
                name = headers["E2b-Sandbox-Id"]
                if self.fails(name) or headers["X-Access-Token"] != f"token of {name}":
                    return 502, {"code": 502, "message": "the sandbox was not found"}
                (self.folder / name / "cell.py").write_text(body["code"])
                done = self.run(name, [sys.executable, str(self.folder / name / "cell.py")])
                return 200, [{"type": "stdout", "text": done.stdout, "timestamp": 1}, *_error(done)]
            case "DELETE", ["sandboxes" | "instance", name]:
                self.end(name)
                return 204, None
            case "POST", ["instance"]:
                [snapshot] = parse_qs(parts.query)["snapshot_id"]
                return 200, _instance(self.lend({**body, "snapshot_id": snapshot}), status="pending")
            case "GET", ["instance", name]:
                return 200, _instance(name, status="ready")
            case "POST", ["instance", name, "exec"]:
                if self.fails(name):
                    return 500, {"detail": "the instance does not answer"}
                [command] = body["command"]
                done = self.run(name, ["sh", "-c", command])
                return 200, {"exit_code": done.returncode, "stdout": done.stdout, "stderr": done.stderr}
        return 404, {"message": f"there is no {method} {path}"}


def _error(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    if done.returncode == 0:
        return []
    return [{"type": "error", "name": "Error", "value": done.stderr[-500:], "traceback": done.stderr}]


def _instance(name: str, *, status: str) -> dict[str, Any]:
    return {
        "id": name,
        "created": 1,
        "status": status,
        "spec": {"vcpus": 1, "memory": 1024, "disk_size": 1024},
        "refs": {"snapshot_id": "s", "image_id": "i"},
        "networking": {"http_services": []},
    }


@contextmanager
def fake_service() -> Iterator[FakeService]:
    """Serve both until the block ends."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)  # programs run there as nobody, where we are root
        fake = FakeService(Path(folder))

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                raw = self.rfile.read(int(self.headers["Content-Length"] or 0))
                status, answer = fake.answer(self.command, self.path, self.headers, json.loads(raw) if raw else {})
                lines = answer if isinstance(answer, list) else [] if answer is None else [answer]
                body = "".join(json.dumps(line) + "\n" for line in lines).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_GET = do_DELETE = do_POST

            def log_message(self, *arguments: Any) -> None:
                pass

        with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            fake.url = f"http://127.0.0.1:{server.server_port}"
            thread = threading.Thread(target=server.serve_forever)
            thread.start()
            yield fake
            server.shutdown()
            thread.join()
