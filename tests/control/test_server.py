"""The progress server over real HTTPS: who may post, how much, how fast, and what comes back."""

from __future__ import annotations

import asyncio
import gzip
import json
import shutil
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from posttrain.contract.facts import (
    BODY_MAX_BYTES,
    AcknowledgedSource,
    CheckpointSaved,
    FactBody,
    FactsReply,
    Logged,
    NonFinite,
    Started,
)
from posttrain.control.authentication import Authenticator
from posttrain.control.certificates import CertificateFiles, ServingCertificate
from posttrain.control.kinds import TOKEN_REVIEW
from posttrain.control.port import Unavailable
from posttrain.control.progress import ProgressWriter
from posttrain.control.server import ProgressServer, ServerLimits
from posttrain.plan.names import resource_path
from posttrain_workloads.reporting import FactClient, FactLog, Reporter
from tests.support.builders import build_report
from tests.support.certificates import TestAuthority
from tests.support.fake_cluster import FakeCluster
from tests.support.reporting_pods import NAMESPACE, add_run, add_sender, progress_of

PATH = "/" + resource_path(namespace=NAMESPACE, run="demo")
STARTED = Started(world_size=2, max_steps=40, resumed_from_step=0)
TOKEN = "token-of-the-pod"


class World:
    """A cluster with a run and its pod, a replica that serves, and a client that trusts it."""

    def __init__(self, folder: Path) -> None:
        self.authority = TestAuthority()
        self.files = self.authority.write(folder / "tls")
        self.cluster = FakeCluster()
        self.run = add_run(self.cluster)
        self.pod = add_sender(self.cluster, self.run, TOKEN)
        self.client: aiohttp.ClientSession
        self.server: ProgressServer

    def build_server(self, **limits: Any) -> ProgressServer:
        return ProgressServer(
            authenticator=Authenticator(self.cluster),
            writer=ProgressWriter(self.cluster),
            certificate=ServingCertificate(self.files),
            limits=ServerLimits(**limits),
        )

    @property
    def trust(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=str(self.files.authority))

    def url(self, path: str) -> str:
        return f"https://127.0.0.1:{self.server.port}{path}"

    async def post(
        self, path: str, body: Any, *, token: str = TOKEN, headers: dict[str, str] | None = None
    ) -> tuple[int, str]:
        sent = {"Authorization": f"Bearer {token}"} if headers is None else headers
        async with self.client.post(self.url(path), data=body, headers=sent, ssl=self.trust) as answer:
            self.headers = answer.headers
            return answer.status, await answer.text()

    async def post_facts(self, *bodies: FactBody, **fields: Any) -> tuple[int, str]:
        return await self.post(f"{PATH}/facts", facts(*bodies, **fields))

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.server.port, ssl=self.trust)


@asynccontextmanager
async def serving(folder: Path, **limits: Any) -> AsyncIterator[World]:
    world = World(folder)
    world.server = world.build_server(**limits)
    await world.server.start(host="127.0.0.1", port=0)
    try:
        async with aiohttp.ClientSession() as world.client:
            yield world
    finally:
        await world.server.close()


def run(folder: Path, scenario: Callable[[World], Awaitable[None]], **limits: Any) -> None:
    """Run a scenario against a server that serves."""

    async def main() -> None:
        async with asyncio.timeout(60), serving(folder, **limits) as world:
            await scenario(world)

    asyncio.run(main())


def facts(*bodies: FactBody, **fields: Any) -> bytes:
    return build_report(*bodies, **fields).model_dump_json().encode()


def kubeflow(**metrics: object) -> bytes:
    """Return a body as transformers' KubeflowCallback posts it."""
    listed = [{"name": name, "value": str(value)} for name, value in metrics.items()]
    return json.dumps({"trainerStatus": {"metrics": listed}}).encode()


# --- What is taken ---------------------------------------------------------------------------------------------------


def test_facts_reach_status_and_are_acknowledged(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        status, answer = await world.post_facts(STARTED)

        assert (status, json.loads(answer)) == (200, {"acknowledged": [{"attempt": 1, "source": "rank-0", "seq": 1}]})
        progress = progress_of(world.cluster, world.run)
        assert progress is not None
        assert (progress.attempt, progress.max_steps) == (1, 40)

    run(tmp_path, scenario)


def test_a_post_of_the_kubeflow_callback_moves_the_step(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        body = kubeflow(**{"current_step": 10, "total_steps": 40, "loss": 1.5, "x" * 65: 1, "long": "9" * 65})
        assert await world.post(f"{PATH}/status", body) == (200, "{}")
        await world.server.close()
        progress = progress_of(world.cluster, world.run)
        assert progress is not None
        assert (progress.step, progress.percentage) == (10, 25)
        assert [metric.name for metric in progress.metrics or ()] == ["loss"]

    run(tmp_path, scenario)


def test_a_post_without_a_step_is_accepted_and_changes_nothing(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        assert await world.post(f"{PATH}/status", kubeflow(total_steps=40)) == (200, "{}")
        await world.server.close()
        assert progress_of(world.cluster, world.run) is None

    run(tmp_path, scenario)


def test_what_is_not_durable_yet_is_answered_with_when_to_come_again(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        await world.post_facts(STARTED, Logged(step=1, metrics={}))
        status, answer = await world.post_facts(Logged(step=2, metrics={}), first_seq=3)
        reply = FactsReply.model_validate_json(answer)

        assert status == 200
        assert reply.acknowledged == (AcknowledgedSource(attempt=1, source="rank-0", seq=2),)
        assert reply.retry_after_seconds is not None
        assert 25 < reply.retry_after_seconds <= 30

    run(tmp_path, scenario)


def test_a_reporter_loses_nothing_over_two_replicas_of_which_one_is_lost(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        replica = world.build_server()
        await replica.start(host="127.0.0.1", port=0)
        token = tmp_path / "token"
        token.write_text(TOKEN)
        ports = [world.server.port, replica.port]

        class Balanced(FactClient):
            """Goes to the replicas in turn, as connections through a Service do."""

            def post(self, report: Any) -> FactsReply:
                ports.append(ports.pop(0))
                self.url = f"https://127.0.0.1:{ports[0]}{PATH}/facts"
                return super().post(report)

        log = FactLog(tmp_path / "facts.jsonl")
        client = Balanced("", token_file=token, ca_file=world.files.authority)

        def train() -> bool:
            reporter = Reporter(attempt=1, source="rank-0", log=log, client=client)
            reporter.send(STARTED)
            for step in range(1, 6):
                reporter.send(Logged(step=step, metrics={"loss": "1.0"}))
            reporter.flush(timeout_seconds=20)
            reporter.send(Logged(step=6, metrics={"loss": "1.0"}))
            reporter.send(CheckpointSaved(step=6, uri="pvc://c/checkpoint-6", bytes=1, digest="d"))
            reporter.send(Logged(step=7, metrics={"loss": "1.0"}))
            return reporter.close(timeout_seconds=20)

        assert await asyncio.to_thread(train)
        await replica.close()
        assert log.unacknowledged() == []
        progress = progress_of(world.cluster, world.run)
        assert progress is not None
        assert (progress.step, progress.checkpoints_saved) == (7, 1)

    run(tmp_path, scenario)


# --- Who may post ----------------------------------------------------------------------------------------------------


def test_a_wrong_or_missing_token_is_unauthorized(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        for headers in ({}, {"Authorization": "Basic dTpw"}, {"Authorization": "Bearer "}):
            status, answer = await world.post(f"{PATH}/facts", facts(STARTED), headers=headers)
            assert (status, answer) == (401, "the request has no bearer token\n")
            assert world.headers["WWW-Authenticate"] == "Bearer"
        status, answer = await world.post(f"{PATH}/facts", facts(STARTED), token="made-up")
        assert (status, answer) == (401, "the bearer token is wrong, has expired, or is not for this run\n")
        assert progress_of(world.cluster, world.run) is None

    run(tmp_path, scenario)


def test_a_pod_of_somebody_else_is_forbidden(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        world.cluster.put({**world.pod, "metadata": {**world.pod["metadata"], "ownerReferences": []}})
        status, answer = await world.post_facts(STARTED)
        assert (status, "is not controlled by a job of TrainingRun team/demo" in answer) == (403, True)

    run(tmp_path, scenario)


def test_a_silent_api_server_is_unavailable_for_a_while(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        world.cluster.fail("create", Unavailable("no answer within 5 s", retry_after=7.2))
        assert await world.post_facts(STARTED) == (503, "no answer within 5 s\n")
        assert world.headers["Retry-After"] == "8"
        world.cluster.fail("apply_status", Unavailable("etcd is read-only"))
        status, answer = await world.post_facts(STARTED)
        assert (status, "etcd is read-only" in answer, world.headers["Retry-After"]) == (503, True, "5")

    run(tmp_path, scenario)


def test_a_run_that_is_gone_is_not_found(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        await world.post_facts(STARTED)
        await world.cluster.delete(world.run.key, uid=world.run.uid)
        status, answer = await world.post_facts(NonFinite(metric="loss", step=1), first_seq=2)
        assert (status, answer) == (404, "TrainingRun team/demo does not exist any more\n")

    run(tmp_path, scenario)


def test_the_attempt_is_the_pods_and_not_the_bodys(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        answer = await world.post_facts(STARTED, attempt=2)
        assert answer == (400, "the body is of attempt 2 and the token of attempt 1\n")

    run(tmp_path, scenario)


# --- What is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/", "/healthz", PATH, f"{PATH}/other", f"{PATH}/facts/", f"/x{PATH}/facts"])
def test_another_path_is_not_found_and_asks_nobody(tmp_path: Path, path: str) -> None:
    async def scenario(world: World) -> None:
        assert (await world.post(path, facts(STARTED)))[0] == 404
        assert world.cluster.requests == []

    run(tmp_path, scenario)


def test_nothing_can_be_read_from_it(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        async with world.client.get(world.url(f"{PATH}/facts"), ssl=world.trust) as answer:
            assert (answer.status, answer.headers["Allow"]) == (405, "POST")

    run(tmp_path, scenario)


@pytest.mark.parametrize("endpoint", ["status", "facts"])
@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"trainerStatus": 1}', b"\xff", gzip.compress(b"{}", mtime=0)])
def test_a_body_that_is_not_what_it_should_be_is_refused(tmp_path: Path, endpoint: str, body: bytes) -> None:
    async def scenario(world: World) -> None:
        status, answer = await world.post(f"{PATH}/{endpoint}", body)
        assert (status, answer.startswith("the body ")) == (400, True)

    run(tmp_path, scenario)


def test_a_body_may_have_64_kib_and_no_byte_more(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        padding = BODY_MAX_BYTES - len(kubeflow(current_step=1, padding=""))
        largest = await world.post(f"{PATH}/status", kubeflow(current_step=1, padding="x" * padding))
        longer = await world.post(f"{PATH}/status", kubeflow(current_step=1, padding="x" * (padding + 1)))
        assert (largest[0], longer) == (200, (413, "the body may have 65536 bytes\n"))

    run(tmp_path, scenario)


def test_a_body_of_unknown_length_is_cut_off_at_the_limit(tmp_path: Path) -> None:
    async def chunks(count: int) -> AsyncIterator[bytes]:
        yield kubeflow(current_step=1)
        for _ in range(count):
            yield b" " * 1024

    async def scenario(world: World) -> None:
        assert (await world.post(f"{PATH}/status", chunks(2)))[0] == 200
        assert (await world.post(f"{PATH}/status", chunks(100)))[0] == 413

    run(tmp_path, scenario)


def test_a_run_that_posts_too_often_is_told_to_wait_and_no_other(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        other = add_run(world.cluster, name="other")
        add_sender(world.cluster, other, "token-of-other")
        statuses = [(await world.post(f"{PATH}/status", kubeflow(current_step=i)))[0] for i in range(4)]
        wait = world.headers["Retry-After"]
        elsewhere = await world.post(f"{PATH.replace('demo', 'other')}/status", kubeflow(), token="token-of-other")
        assert (statuses, wait, elsewhere[0]) == ([200, 200, 200, 429], "10", 200)

    run(tmp_path, scenario, posts_per_second=0.1, posts_burst=3)


def test_an_address_that_guesses_tokens_is_told_to_wait_before_the_api_server_is_asked(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        assert (await world.post(f"{PATH}/status", kubeflow(current_step=1)))[0] == 200
        guesses = [(await world.post(f"{PATH}/status", kubeflow(), token=f"guess-{i}"))[0] for i in range(4)]
        told, wait = (await world.post(f"{PATH}/status", kubeflow(), token="guess-4"))[1], world.headers["Retry-After"]
        again = (await world.post(f"{PATH}/status", kubeflow(), token="guess-0"))[0]
        known = (await world.post(f"{PATH}/status", kubeflow(current_step=2)))[0]
        assert (guesses, again, known) == ([401, 401, 429, 429], 401, 200)
        assert (told, wait) == ("127.0.0.1 sends more than 0.1 new tokens a second\n", "10")

    run(tmp_path, scenario, reviews_per_second=0.1, reviews_burst=3)


# --- Slow and many clients -------------------------------------------------------------------------------------------


def test_a_client_that_sends_nothing_or_half_its_headers_is_closed(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        for sent in (b"", b"POST / HTTP/1.1\r\nHost: x\r\n"):
            reader, writer = await world.connect()
            writer.write(sent)
            async with asyncio.timeout(10):
                assert await reader.read() == b""
            writer.close()

    run(tmp_path, scenario, request_seconds=0.2)


def test_a_body_that_does_not_come_is_not_waited_for(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        reader, writer = await world.connect()
        head = (
            f"POST {PATH}/facts HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nContent-Length: 100\r\n\r\n{{"
        )
        writer.write(head.encode())
        async with asyncio.timeout(10):
            answer = await reader.readuntil(b"0.2 s\n")
        assert answer.startswith(b"HTTP/1.1 408")
        writer.close()

    run(tmp_path, scenario, request_seconds=0.2, shutdown_seconds=0.2)


def test_connections_beyond_the_limit_are_closed_and_the_others_served(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        first = [await world.connect() for _ in range(2)]
        reader, writer = await world.connect()
        async with asyncio.timeout(10):
            with pytest.raises(ConnectionError):
                if await reader.read() == b"":
                    raise ConnectionResetError
        writer.close()
        for _, opened in first:
            opened.close()
            await opened.wait_closed()
        assert (await world.post_facts(STARTED))[0] == 200

    run(tmp_path, scenario, connections=2)


# --- TLS and the end -------------------------------------------------------------------------------------------------


def test_it_speaks_tls_alone_and_with_a_certificate_that_is_checked(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        with pytest.raises(aiohttp.ClientError):
            await world.client.post(world.url(f"{PATH}/facts").replace("https", "http"))
        with pytest.raises(aiohttp.ClientConnectorCertificateError):
            await world.client.post(world.url(f"{PATH}/facts"))

    run(tmp_path, scenario)


def test_a_swapped_certificate_serves_new_connections_without_a_restart(tmp_path: Path) -> None:
    async def peer(world: World, authority: Path) -> bytes:
        context = ssl.create_default_context(cafile=str(authority))
        _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
        found: bytes = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        writer.close()
        return found

    async def main() -> None:
        nonlocal port
        world = World(tmp_path)
        certificate = ServingCertificate(world.files)
        server = ProgressServer(
            authenticator=Authenticator(world.cluster), writer=ProgressWriter(world.cluster), certificate=certificate
        )
        await server.start(host="127.0.0.1", port=0)
        port = server.port
        before = await peer(world, world.files.authority)
        new = TestAuthority().write(tmp_path / "new")
        swap(new, world.files)
        assert certificate.reload_if_changed()
        after = await peer(world, new.authority)
        await server.close()
        assert before != after
        assert certificate.authority_text() == new.authority.read_text()

    port = 0
    asyncio.run(main())


def swap(new: CertificateFiles, served: CertificateFiles) -> None:
    for source, target in (
        (new.certificate, served.certificate),
        (new.key, served.key),
        (new.authority, served.authority),
    ):
        shutil.copy(source, target)


def test_what_was_taken_is_in_status_when_the_server_ends(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        await world.post_facts(STARTED, Logged(step=1, metrics={}))
        await world.post_facts(Logged(step=2, metrics={}), first_seq=3)
        await world.post(f"{PATH}/status", kubeflow(current_step=3))
        port = world.server.port
        await world.server.close()

        progress = progress_of(world.cluster, world.run)
        assert progress is not None
        assert (progress.step, [entry.seq for entry in progress.acknowledged or ()]) == (3, [3])
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", port)

    run(tmp_path, scenario)


def test_a_gangs_posts_cost_the_api_server_little(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        await world.post_facts(STARTED, Logged(step=1, metrics={}))
        for step in range(2, 40):
            await world.post_facts(Logged(step=step, metrics={}), first_seq=step + 1)
            await world.post(f"{PATH}/status", kubeflow(current_step=step))
        assert world.cluster.count("create", TOKEN_REVIEW) == 1
        assert world.cluster.count("apply_status") == 1

    run(tmp_path, scenario)
