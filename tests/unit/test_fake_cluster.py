"""The API server that unit tests stand on behaves like a real one where decisions depend on it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from posttrain.control.kinds import CONFIG_MAP, JOB, POD, TRAINING_RUN
from posttrain.control.port import (
    AlreadyExists,
    Conflict,
    Expired,
    NotFound,
    ObjectKey,
    Rejected,
    Unavailable,
    WatchEvent,
)
from posttrain.plan.types import Manifest
from tests.support.fake_cluster import FakeCluster

KEY = ObjectKey(*CONFIG_MAP, "team", "demo")


def config_map(name: str = "demo", *, owner: str | None = None, **fields: Any) -> Manifest:
    metadata: dict[str, Any] = {"name": name, "namespace": "team", "labels": {"app": name}}
    if owner is not None:
        metadata["ownerReferences"] = [{"uid": owner, "controller": True}]
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, **fields}


def run_manifest(**metadata: Any) -> Manifest:
    return {
        "apiVersion": TRAINING_RUN[0],
        "kind": TRAINING_RUN[1],
        "metadata": {"name": "demo", "namespace": "team", **metadata},
        "spec": {"suspend": False},
    }


def of_status(run: Manifest, **status: Any) -> Manifest:
    return {**{k: run[k] for k in ("apiVersion", "kind", "metadata")}, "status": status}


def test_an_object_gets_an_identity_and_every_change_a_higher_version() -> None:
    async def scenario() -> None:
        cluster = FakeCluster()
        made = await cluster.create(config_map(data={"a": "1"}))
        changed = await cluster.apply(config_map(data={"a": "2"}), uid=made["metadata"]["uid"])
        again = await cluster.apply(config_map(data={"a": "2"}), uid=made["metadata"]["uid"])

        assert made["metadata"]["uid"] == changed["metadata"]["uid"]
        assert int(changed["metadata"]["resourceVersion"]) > int(made["metadata"]["resourceVersion"])
        assert again == changed == await cluster.get(KEY)
        with pytest.raises(AlreadyExists):
            await cluster.create(config_map())
        with pytest.raises(Conflict):
            await cluster.apply(config_map(), uid="another")
        with pytest.raises(NotFound):
            await cluster.get(ObjectKey(*CONFIG_MAP, "team", "another"))

    asyncio.run(scenario())


def test_generation_follows_the_spec_and_not_the_status() -> None:
    async def scenario() -> None:
        cluster = FakeCluster()
        run = await cluster.create({**run_manifest(), "status": {"stage": "Training"}})
        assert "status" not in run
        run = await cluster.apply_status(of_status(run, stage="Training"), manager="posttrain")
        assert run["metadata"]["generation"] == 1
        run = await cluster.patch(ObjectKey.of(run), {"spec": {"suspend": True}, "status": {"stage": "No"}})
        assert (run["metadata"]["generation"], run["status"], run["spec"]) == (
            2,
            {"stage": "Training"},
            {"suspend": True},
        )

    asyncio.run(scenario())


def test_each_manager_owns_its_part_of_the_status() -> None:
    async def scenario() -> None:
        cluster = FakeCluster()
        first = await cluster.create(run_manifest())
        second = await cluster.apply_status(of_status(first, stage="Training", gpus=8), manager="posttrain")
        third = await cluster.apply_status(of_status(second, progress={"step": 1}), manager="posttrain-progress")
        assert third["status"] == {"stage": "Training", "gpus": 8, "progress": {"step": 1}}

        last = await cluster.apply_status(of_status(third, stage="Failed"), manager="posttrain")

        assert last["status"] == {"stage": "Failed", "progress": {"step": 1}}
        with pytest.raises(Conflict):
            await cluster.apply_status(of_status(second, stage="Succeeded"), manager="posttrain")

    asyncio.run(scenario())


def test_what_an_apply_leaves_out_goes_unless_it_was_created_with_it() -> None:
    async def scenario() -> None:
        cluster = FakeCluster()
        uid = (await cluster.create(config_map(data={"created": "1"})))["metadata"]["uid"]
        await cluster.apply(config_map(data={"created": "1", "applied": "1"}), uid=uid)
        left = await cluster.apply(config_map(), uid=uid)

        assert left["data"] == {"created": "1"}
        assert [(e["manager"], e["operation"]) for e in left["metadata"]["managedFields"]] == [
            ("posttrain", "Apply"),
            ("posttrain", "Update"),
        ]
        assert left["metadata"]["managedFields"][1]["fieldsV1"] == {
            "f:data": {"f:created": {}},
            "f:metadata": {"f:labels": {"f:app": {}}},
        }

    asyncio.run(scenario())


def test_what_is_owned_goes_after_its_owner() -> None:
    async def scenario() -> None:
        cluster = FakeCluster()
        owner = (await cluster.create(config_map()))["metadata"]["uid"]
        child = (await cluster.create(config_map("child", owner=owner)))["metadata"]["uid"]
        await cluster.create(config_map("grandchild", owner=child))
        with pytest.raises(Conflict):
            await cluster.delete(KEY, uid="another")

        await cluster.delete(KEY, uid=owner)
        await cluster.delete(KEY, uid=owner)
        await cluster.create(config_map("late", owner=owner))

        assert cluster.objects(CONFIG_MAP) == []

    asyncio.run(scenario())


def test_a_finalizer_keeps_an_object_until_it_is_taken_away() -> None:
    async def scenario() -> None:
        cluster = FakeCluster()
        made = cluster.put(run_manifest(finalizers=["somebody/else"]))
        await cluster.delete(ObjectKey.of(made), uid=made["metadata"]["uid"])
        assert "deletionTimestamp" in cluster.objects(TRAINING_RUN)[0]["metadata"]

        await cluster.patch(ObjectKey.of(made), {"metadata": {"finalizers": None}})

        assert cluster.objects(TRAINING_RUN) == []

    asyncio.run(scenario())


def test_an_immutable_config_map_is_not_changed() -> None:
    async def scenario() -> None:
        cluster = FakeCluster()
        made = await cluster.create(config_map(immutable=True, data={"a": "1"}))
        with pytest.raises(Rejected):
            await cluster.apply(config_map(immutable=True, data={"a": "2"}), uid=made["metadata"]["uid"])

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("selector", "names"),
    [
        ("app=a", ["a"]),
        ("app!=a", ["b"]),
        ("app in (a, b),app", ["a", "b"]),
        ("app notin (a)", ["b"]),
        ("!app", []),
    ],
)
def test_lists_are_selected_by_labels(selector: str, names: list[str]) -> None:
    cluster = FakeCluster()
    for name in ("a", "b"):
        cluster.put(config_map(name))

    found = asyncio.run(cluster.list(*CONFIG_MAP, namespace="team", label_selector=selector))

    assert [item["metadata"]["name"] for item in found.items] == names


def test_lists_are_selected_by_namespace_and_fields_and_know_their_kind() -> None:
    async def scenario() -> None:
        cluster = FakeCluster(missing_kinds=frozenset({JOB}))
        cluster.put(config_map("a"))
        by_name = await cluster.list(*CONFIG_MAP, field_selector="metadata.name=a")
        elsewhere = await cluster.list(*CONFIG_MAP, namespace="elsewhere")
        assert (len(by_name.items), len(elsewhere.items)) == (1, 0)
        with pytest.raises(NotFound):
            await cluster.list(*JOB)

    asyncio.run(scenario())


def test_a_watch_tells_what_happened_since_a_version_until_it_is_cut() -> None:
    async def scenario() -> None:
        cluster = FakeCluster()
        cluster.put(config_map("before"))
        listed = await cluster.list(*CONFIG_MAP)
        cluster.put(config_map("a"))
        events: list[WatchEvent] = []

        async def follow() -> None:
            version = listed.resource_version
            async for event in cluster.watch(*CONFIG_MAP, resource_version=version, label_selector="app=a"):
                events.append(event)

        following = asyncio.create_task(follow())
        await asyncio.sleep(0)
        cluster.put(config_map("a", data={"x": "1"}))
        cluster.put(config_map("b"))
        made = cluster.objects(CONFIG_MAP)[0]
        await cluster.delete(ObjectKey.of(made), uid=made["metadata"]["uid"])
        cluster.send_bookmarks()
        cluster.cut_watches()
        await following

        assert [event.type for event in events] == ["ADDED", "MODIFIED", "DELETED", "BOOKMARK"]

    asyncio.run(scenario())


def test_a_watch_from_a_forgotten_version_is_expired() -> None:
    async def scenario() -> None:
        cluster = FakeCluster()
        version = (await cluster.list(*CONFIG_MAP)).resource_version
        cluster.put(config_map())
        cluster.expire_watches()
        with pytest.raises(Expired):
            await anext(cluster.watch(*CONFIG_MAP, resource_version=version))

    asyncio.run(scenario())


def test_a_token_is_reviewed_for_its_audience() -> None:
    async def review(cluster: FakeCluster, audience: str) -> dict[str, Any]:
        spec = {"token": "t", "audiences": [audience]}
        body = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "metadata": {}, "spec": spec}
        status: dict[str, Any] = (await cluster.create(body))["status"]
        return status

    cluster = FakeCluster()
    pod = cluster.put({"apiVersion": POD[0], "kind": POD[1], "metadata": {"name": "p", "namespace": "team"}})
    cluster.add_token("t", pod=pod, audience="right")

    right, wrong = asyncio.run(review(cluster, "right")), asyncio.run(review(cluster, "wrong"))

    assert right["user"]["extra"]["authentication.kubernetes.io/pod-uid"] == [pod["metadata"]["uid"]]
    assert (right["authenticated"], wrong["authenticated"]) == (True, False)


def test_a_call_can_be_made_to_fail() -> None:
    async def scenario() -> None:
        cluster = FakeCluster()
        cluster.put(config_map())
        cluster.fail("get", Unavailable("busy"))
        with pytest.raises(Unavailable):
            await cluster.get(KEY)
        assert (await cluster.get(KEY))["metadata"]["name"] == "demo"
        assert cluster.count("get", CONFIG_MAP) == 2

    asyncio.run(scenario())
