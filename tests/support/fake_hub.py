"""A Hub on loopback: serves folders as repositories over the part of the Hub's HTTP interface that its client uses.

It owns no semantics beyond what tests need: revisions, gated repositories, tokens, byte ranges.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_a_token_of_somebody"


@dataclass(frozen=True)
class Repo:
    """One repository: `kind` is `models` or `datasets`, `name` is `org/name`."""

    kind: str
    name: str
    folder: Path
    branches: tuple[str, ...] = ("main",)
    gated: bool = False

    @property
    def commit(self) -> str:
        """Return the commit of every branch."""
        return hashlib.sha1(f"{self.kind}/{self.name}".encode()).hexdigest()

    def files(self) -> dict[str, Path]:
        """Return every file by its path in the repository."""
        files = (file for file in sorted(self.folder.rglob("*")) if file.is_file())
        return {file.relative_to(self.folder).as_posix(): file for file in files}


@dataclass
class FakeHub:
    """The server's address, and what was asked of it."""

    url: str
    repos: list[Repo]
    requests: list[str] = field(default_factory=list)


@contextmanager
def serve(*repos: Repo) -> Iterator[FakeHub]:
    """Serve repositories until the block ends."""
    hub = FakeHub(url="", repos=list(repos))
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Refusal(Exception):
    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def log_message(self, *_: Any) -> None:
        return

    def _answer(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length).decode()
        url = urlsplit(self.path)
        self.hub.requests.append(f"{self.command} {self.path}")
        try:
            self._check_token()
            parts = [unquote(part) for part in url.path.strip("/").split("/")]
            if parts == ["api", "whoami-v2"]:
                if "Authorization" not in self.headers:
                    raise _Refusal(401)
                self._send_json({"type": "user", "name": "somebody", "auth": {}})
            elif parts[0] == "api" and parts[1] in ("models", "datasets"):
                self._answer_api(parts[1], parts[2:], query=parse_qs(url.query), body=body)
            else:
                kind = "datasets" if parts[0] == "datasets" else "models"
                self._answer_file(kind, parts[1:] if kind == "datasets" else parts)
        except _Refusal as refusal:
            headers = {"X-Error-Code": refusal.code, "X-Error-Message": refusal.message}
            self._send(refusal.status, b"", {name: value for name, value in headers.items() if value})

    def _check_token(self) -> None:
        given = self.headers.get("Authorization")
        if given is not None and given != f"Bearer {TOKEN}":
            raise _Refusal(401, message="Invalid credentials in Authorization header")

    def _find(self, kind: str, name: str) -> Repo:
        for repo in self.hub.repos:
            if (repo.kind, repo.name) == (kind, name):
                return repo
        if name.startswith("down/"):
            raise _Refusal(503, message="maintenance")
        # Without a token the Hub does not say whether it is missing or private.
        raise _Refusal(401 if "Authorization" not in self.headers else 404, "RepoNotFound", "Repository not found")

    @staticmethod
    def _check_revision(repo: Repo, revision: str) -> None:
        if revision not in (*repo.branches, repo.commit):
            raise _Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")

    def _answer_api(self, kind: str, parts: list[str], *, query: dict[str, list[str]], body: str) -> None:
        repo = self._find(kind, "/".join(parts[:2]))
        action, *rest = parts[2:] or ["revision"]
        revision = rest[0] if rest else "main"
        self._check_revision(repo, revision)
        if action == "revision":
            siblings = [{"rfilename": name} for name in repo.files()]
            self._send_json(
                {
                    "id": repo.name,
                    "sha": repo.commit,
                    "private": False,
                    "siblings": siblings,
                    "tags": [],
                    "downloads": 0,
                }
            )
        elif action == "tree":
            recursive = query.get("recursive", ["False"])[0].lower() in ("true", "1")
            self._send_json(_tree(repo, "/".join(rest[1:]), recursive=recursive))
        elif action == "paths-info":
            self._send_json(_paths_info(repo, _wanted_paths(body)))
        else:
            raise _Refusal(404, "EntryNotFound", f"no {action} here")

    def _answer_file(self, kind: str, parts: list[str]) -> None:
        repo = self._find(kind, "/".join(parts[:2]))
        if len(parts) < 5 or parts[2] != "resolve":
            raise _Refusal(404)
        self._check_revision(repo, parts[3])
        if repo.gated and "Authorization" not in self.headers:
            raise _Refusal(401, "GatedRepo", "Access to this repository is restricted")
        file = repo.files().get("/".join(parts[4:]))
        headers = {"X-Repo-Commit": repo.commit, "Accept-Ranges": "bytes"}
        if file is None:
            raise _Refusal(404, "EntryNotFound", "Entry not found")
        content = file.read_bytes()
        headers["ETag"] = f'"{_object_id(content)}"'
        wanted = self.headers.get("Range")
        if wanted:
            start, _, end = wanted.removeprefix("bytes=").partition("-")
            first, last = int(start), min(int(end) if end else len(content) - 1, len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            self._send(206, content[first : last + 1], headers)
        else:
            self._send(200, content, headers)

    def _send_json(self, data: Any) -> None:
        self._send(200, json.dumps(data).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _object_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _file_entry(name: str, file: Path) -> dict[str, Any]:
    return {"type": "file", "path": name, "size": file.stat().st_size, "oid": _object_id(file.read_bytes())}


def _tree(repo: Repo, below: str, *, recursive: bool) -> list[dict[str, Any]]:
    prefix = f"{below}/" if below else ""
    entries: dict[str, dict[str, Any]] = {}
    for name, file in repo.files().items():
        if not name.startswith(prefix):
            continue
        parts = name.removeprefix(prefix).split("/")
        for depth in range(1, len(parts)):
            folder = prefix + "/".join(parts[:depth])
            if recursive or depth == 1:
                entries[folder] = {"type": "directory", "path": folder, "size": 0, "oid": "0" * 40}
        if recursive or len(parts) == 1:
            entries[name] = _file_entry(name, file)
    if not entries and below:
        raise _Refusal(404, "EntryNotFound", f"{below} does not exist")
    return list(entries.values())


def _wanted_paths(body: str) -> list[str]:
    if body.startswith("{"):
        paths = json.loads(body)["paths"]
        return [paths] if isinstance(paths, str) else paths
    return parse_qs(body).get("paths", [])


def _paths_info(repo: Repo, paths: list[str]) -> list[dict[str, Any]]:
    files = repo.files()
    found = []
    for path in paths:
        if path in files:
            found.append(_file_entry(path, files[path]))
        elif any(name.startswith(f"{path}/") for name in files):
            found.append({"type": "directory", "path": path, "size": 0, "oid": "0" * 40})
    return found
