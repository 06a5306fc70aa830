"""Who may report for a run: what a token proves, for how long, and what it costs the API server."""

from __future__ import annotations

import asyncio
import base64
import json
from typing import Any

import pytest

from posttrain.control.authentication import Authenticator, Forbidden, Sender, Unauthenticated
from posttrain.control.kinds import JOB, POD, PYTORCHJOB, TOKEN_REVIEW, TRAINING_RUN
from posttrain.control.port import ObjectKey, Rejected, Unavailable
from posttrain.control.progress import RunGone
from posttrain.plan.names import resource_path
from tests.support.clock import Clock
from tests.support.fake_cluster import FakeCluster
from tests.support.reporting_pods import NAMESPACE, add_job, add_pod, add_run, add_sender

TOKEN = "token-of-the-pod"


class World:
    """A cluster with a run whose pod has a token, and an authenticator."""

    def __init__(self, *, attempt: int = 1, current: int | None = 1, token: str = TOKEN) -> None:
        self.clock = Clock()
        self.cluster = FakeCluster()
        self.run = add_run(self.cluster, attempt=current)
        self.pod = add_sender(self.cluster, self.run, token, attempt=attempt)
        self.authenticator = Authenticator(self.cluster, wall_clock=self.clock.wall, monotonic=self.clock.monotonic)

    def add_own_pod(self, job: dict[str, Any] | None, *, attempt: int = 1) -> None:
        """Let TOKEN be of another pod with the run's labels."""
        pod = add_pod(self.cluster, job, attempt=attempt)
        self.cluster.add_token(TOKEN, pod=pod, audience=resource_path(namespace=NAMESPACE, run="demo"))

    async def prove(self, token: str = TOKEN, *, run: str = "demo") -> Sender:
        return await self.authenticator.prove(token, namespace=NAMESPACE, run=run)

    @property
    def reviews(self) -> int:
        return self.cluster.count("create", TOKEN_REVIEW)


@pytest.mark.parametrize(("attempt", "current"), [(1, 1), (2, 2), (1, 3), (0, None), (0, 2)])
def test_a_pods_token_proves_its_run_and_its_attempt(attempt: int, current: int | None) -> None:
    world = World(attempt=attempt, current=current)

    sender = asyncio.run(world.prove())

    assert sender == Sender(run=world.run, attempt=attempt, pod=world.pod["metadata"]["name"])


def test_an_attempt_that_status_does_not_have_yet_is_tried_again() -> None:
    async def scenario() -> None:
        world = World(attempt=2, current=1)
        with pytest.raises(Unavailable, match=r"attempt 2 is not in the status of TrainingRun team/demo yet") as raised:
            await world.prove()
        assert raised.value.retry_after == 2

        world.cluster.put_status(world.run.key, {"attempt": 2})
        assert (await world.prove()).attempt == 2

    asyncio.run(scenario())


def test_a_token_of_another_run_or_of_nobody_proves_nothing() -> None:
    async def scenario() -> None:
        world = World()
        other = add_run(world.cluster, name="other")
        add_sender(world.cluster, other, "token-of-other")
        for token in ("token-of-other", "made-up"):
            with pytest.raises(Unauthenticated):
                await world.prove(token)

    asyncio.run(scenario())


def test_a_token_without_audience_is_not_taken() -> None:
    class OldServer(FakeCluster):
        def _review(self, spec: Any) -> dict[str, Any]:
            return {"authenticated": True, "user": {}}

    with pytest.raises(Unauthenticated):
        asyncio.run(Authenticator(OldServer()).prove(TOKEN, namespace=NAMESPACE, run="demo"))


def test_a_token_that_is_bound_to_no_pod_is_refused() -> None:
    world = World()
    world.cluster.tokens[TOKEN]["user"]["extra"] = {}
    with pytest.raises(Forbidden, match="bound to no pod"):
        asyncio.run(world.prove())


def test_a_pod_that_is_another_by_now_is_refused() -> None:
    world = World()
    world.cluster.put({**world.pod, "metadata": {**world.pod["metadata"], "uid": "another"}})
    with pytest.raises(Forbidden, match="another one by now"):
        asyncio.run(world.prove())


def test_a_pod_that_somebody_labelled_is_refused() -> None:
    world = World()
    world.add_own_pod(None)
    with pytest.raises(Forbidden, match="not controlled by a job of TrainingRun team/demo"):
        asyncio.run(world.prove())


@pytest.mark.parametrize("name", ["demo-a1", "another-a1", "demo-prepare"])
def test_a_pod_of_somebodys_own_job_is_refused(name: str) -> None:
    world = World()
    world.add_own_pod(add_job(world.cluster, None, kind=PYTORCHJOB, name=name))
    with pytest.raises(Forbidden, match="not controlled by"):
        asyncio.run(world.prove())


def test_a_pod_of_a_job_that_another_run_controls_is_refused() -> None:
    world = World()
    other = add_run(world.cluster, name="other")
    owner = next(r for r in world.cluster.objects(TRAINING_RUN) if r["metadata"]["uid"] == other.uid)
    world.add_own_pod(add_job(world.cluster, owner, kind=PYTORCHJOB, name="demo-a1"))
    with pytest.raises(Forbidden, match="PyTorchJob demo-a1, which controls pod demo-a1-master-0, is not controlled"):
        asyncio.run(world.prove())


def test_a_label_that_its_job_does_not_bear_out_is_refused() -> None:
    world = World(current=2)
    owner = world.cluster.objects(TRAINING_RUN)[0]
    world.add_own_pod(add_job(world.cluster, owner, kind=PYTORCHJOB, name="demo-a1"), attempt=2)
    with pytest.raises(Forbidden, match=r"labelled posttrain\.dev/attempt=2 and of 1"):
        asyncio.run(world.prove())


def test_a_pod_without_the_runs_label_is_refused() -> None:
    world = World()
    labelled = {**world.pod["metadata"], "labels": {}}
    world.cluster.put({**world.pod, "metadata": labelled})
    with pytest.raises(Forbidden, match=r"not labelled posttrain\.dev/run=demo"):
        asyncio.run(world.prove())


def test_there_is_no_run_to_report_for() -> None:
    async def scenario() -> None:
        world = World()
        pod = world.cluster.put({**world.pod, "metadata": {**world.pod["metadata"], "ownerReferences": []}})
        await world.cluster.delete(world.run.key, uid=world.run.uid)
        assert pod == world.cluster.objects(POD)[0]
        with pytest.raises(RunGone):
            await world.prove()

    asyncio.run(scenario())


def test_a_pod_that_saves_its_last_checkpoint_may_report_after_its_job_is_gone() -> None:
    async def scenario() -> None:
        world = World()
        sender = await world.prove()
        terminating = {**world.pod["metadata"], "finalizers": ["test/still-there"]}
        world.cluster.put({**world.pod, "metadata": terminating})
        job = world.cluster.objects(PYTORCHJOB)[0]
        await world.cluster.delete(ObjectKey.of(job), uid=job["metadata"]["uid"])
        world.clock.advance(61)

        assert await world.prove() == sender

    asyncio.run(scenario())


# --- How long a proof holds, and what it costs -----------------------------------------------------------------------


def test_a_proof_holds_for_a_minute() -> None:
    async def scenario() -> None:
        world = World()
        await world.prove()
        requests = len(world.cluster.requests)
        world.clock.advance(59)
        await world.prove()
        assert len(world.cluster.requests) == requests
        world.clock.advance(2)
        await world.prove()
        assert world.reviews == 2

    asyncio.run(scenario())


def jwt(**claims: Any) -> str:
    """Return a token with these claims, as a service account's looks."""
    encoded = base64.urlsafe_b64encode(json.dumps(claims).encode()).decode().rstrip("=")
    return f"e30.{encoded}.signature"


def test_a_proof_ends_with_its_token() -> None:
    async def scenario() -> None:
        token = jwt(exp=int(Clock().wall()) + 20)
        world = World(token=token)
        await world.prove(token)
        world.clock.advance(19)
        await world.prove(token)
        assert world.reviews == 1
        world.cluster.tokens.clear()
        world.clock.advance(2)
        with pytest.raises(Unauthenticated):
            await world.prove(token)

    asyncio.run(scenario())


@pytest.mark.parametrize("token", ["a.b.c", jwt(exp="soon"), "e30.W10.s", "...", "ü.ü.ü"])
def test_a_token_whose_end_cannot_be_read_is_asked_about_every_minute(token: str) -> None:
    world = World(token=token)
    assert asyncio.run(world.prove(token)).attempt == 1


def test_a_wrong_token_is_asked_about_every_five_seconds() -> None:
    async def scenario() -> None:
        world = World()
        for _ in range(20):
            with pytest.raises(Unauthenticated):
                await world.prove("wrong")
        assert world.reviews == 1
        world.clock.advance(6)
        with pytest.raises(Unauthenticated):
            await world.prove("wrong")
        assert world.reviews == 2

    asyncio.run(scenario())


def test_requests_of_one_token_share_one_review() -> None:
    async def scenario() -> None:
        world = World()
        senders = await asyncio.gather(*(world.prove() for _ in range(50)))
        assert (len(set(senders)), world.reviews) == (1, 1)

    asyncio.run(scenario())


def test_a_request_that_goes_away_takes_no_other_with_it() -> None:
    async def scenario() -> None:
        world = World()
        first, second = asyncio.create_task(world.prove()), asyncio.create_task(world.prove())
        await asyncio.sleep(0)
        first.cancel()
        assert (await second).attempt == 1
        assert world.reviews == 1

    asyncio.run(scenario())


@pytest.mark.parametrize("error", [Unavailable("no answer"), Rejected("forbidden: tokenreviews")])
def test_an_api_server_that_does_not_answer_decides_nothing(error: Exception) -> None:
    async def scenario() -> None:
        world = World()
        world.cluster.fail("create", error)
        with pytest.raises(Unavailable):
            await world.prove()
        assert (await world.prove()).attempt == 1

    asyncio.run(scenario())


def test_the_kinds_of_prepare_and_gang_are_told_apart() -> None:
    world = World(attempt=0)
    owner = world.cluster.objects(TRAINING_RUN)[0]
    world.add_own_pod(add_job(world.cluster, owner, kind=JOB, name="demo-a1"))
    with pytest.raises(Forbidden):
        asyncio.run(world.prove())
