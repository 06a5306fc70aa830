"""The progress server: who may report, how much, and what becomes of it."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from queue import SimpleQueue

import pytest

from posttrain.contract.facts import BODY_MAX_BYTES, FactsReply, Started
from posttrain.contract.facts import AcknowledgedSource as Acknowledged
from posttrain.local.server import ProgressServer
from posttrain.local.state import RunFolder
from posttrain.local.store import RunStore, accept_run
from tests.support.builders import build_report, build_run
from tests.support.local_cluster import now

PATH = "/apis/posttrain.dev/v1alpha1/namespaces/team/trainingruns/demo"
STARTED = Started(world_size=2, max_steps=40, resumed_from_step=0)


class Server:
    """A server with its run, and a client."""

    def __init__(self, folder: Path) -> None:
        self.folder = RunFolder(folder)
        self.folder.path.mkdir()
        self.store = RunStore(self.folder, accept_run(build_run(), stored=None, now=now()))
        self.news: SimpleQueue[None] = SimpleQueue()
        self.server = ProgressServer(self.store, notify=lambda: self.news.put(None), clock=now)
        self.token = self.server.issue(attempt=1)

    def post(self, path: str, body: bytes, *, token: str | None = None) -> tuple[int, str]:
        """Post to a path below the run's; return the status and the answer."""
        headers = {"Authorization": f"Bearer {self.token if token is None else token}"}
        return self.request("POST", PATH + path, body, headers)

    def request(self, method: str, path: str, body: bytes | None, headers: dict[str, str]) -> tuple[int, str]:
        address = self.server.url.removeprefix("http://")
        with closing(http.client.HTTPConnection(address, timeout=10)) as connection:
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            return response.status, response.read().decode()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path / "demo")
    with closing(server.server):
        yield server


def kubeflow(**metrics: object) -> bytes:
    """Return a body as transformers' KubeflowCallback posts it."""
    listed = [{"name": name, "value": str(value)} for name, value in metrics.items()]
    return json.dumps({"trainerStatus": {"metrics": listed}}).encode()


def facts(**changes: object) -> bytes:
    return build_report(STARTED).model_copy(update=changes).model_dump_json().encode()


def test_facts_are_folded_into_the_resource_and_acknowledged(server: Server) -> None:
    status, answer = server.post("/facts", facts())

    assert status == 200
    assert FactsReply.model_validate_json(answer) == FactsReply(
        acknowledged=(Acknowledged(attempt=1, source="rank-0", seq=1),)
    )
    progress = server.store.run.status.progress
    assert progress is not None
    assert (progress.max_steps, progress.world_size) == (40, 2)
    assert server.folder.read_run() == server.store.run
    assert server.news.get_nowait() is None


def test_a_post_of_the_kubeflow_callback_moves_the_step(server: Server) -> None:
    server.post("/facts", facts())

    status, _ = server.post("/status", kubeflow(current_step=10, total_steps=40, loss=1.5))

    assert status == 200
    progress = server.store.run.status.progress
    assert progress is not None
    assert (progress.step, progress.percentage) == (10, 25)


def test_a_post_without_a_step_is_accepted_and_changes_nothing(server: Server) -> None:
    status, _ = server.post("/status", kubeflow(total_steps=40))

    assert (status, server.store.run.status.progress) == (200, None)


@pytest.mark.parametrize("token", ["", "wrong", "ü"])
def test_a_wrong_token_is_refused(server: Server, token: str) -> None:
    headers = {"Authorization": f"Bearer {token}".encode().decode("latin-1")}

    status, answer = server.request("POST", PATH + "/facts", facts(), headers)

    assert (status, "bearer token" in answer) == (401, True)
    assert server.store.run.status.progress is None


def test_no_token_is_refused(server: Server) -> None:
    assert server.request("POST", PATH + "/facts", facts(), {})[0] == 401


def test_the_token_of_a_pod_that_has_ended_is_refused(server: Server) -> None:
    server.server.revoke(server.token)

    assert server.post("/facts", facts())[0] == 401


def test_the_attempt_is_the_tokens_and_not_the_bodys(server: Server) -> None:
    late = server.server.issue(attempt=2)

    status, answer = server.post("/facts", facts(), token=late)

    assert (status, answer) == (400, "the body is of attempt 1 and the token of attempt 2\n")


@pytest.mark.parametrize("path", ["/status", "/facts"])
@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"trainerStatus": 1}', b"\xff"])
def test_a_body_that_is_not_what_it_should_be_is_refused(server: Server, path: str, body: bytes) -> None:
    assert server.post(path, body)[0] == 400
    assert server.store.run.status.progress is None


def test_a_body_may_have_64_kib_and_no_byte_more(server: Server) -> None:
    padding = BODY_MAX_BYTES - len(kubeflow(current_step=1, padding=""))

    largest = server.post("/status", kubeflow(current_step=1, padding="x" * padding))
    longer = server.post("/status", kubeflow(current_step=1, padding="x" * (padding + 1)))

    assert (largest[0], longer[0]) == (200, 413)


def test_a_body_without_a_length_is_refused(server: Server) -> None:
    headers = {"Authorization": f"Bearer {server.token}", "Transfer-Encoding": "chunked"}

    assert server.request("POST", PATH + "/facts", b"0\r\n\r\n", headers)[0] == 411


@pytest.mark.parametrize("path", ["/", PATH, PATH + "/other", PATH.replace("demo", "another") + "/facts"])
def test_another_path_is_not_found(server: Server, path: str) -> None:
    headers = {"Authorization": f"Bearer {server.token}"}

    assert server.request("POST", path, facts(), headers)[0] == 404


def test_nothing_can_be_read_from_it(server: Server) -> None:
    assert server.request("GET", PATH + "/facts", None, {"Authorization": f"Bearer {server.token}"})[0] == 501


def test_it_listens_on_this_machine_alone(server: Server) -> None:
    assert server.server.url.startswith("http://127.0.0.1:")
