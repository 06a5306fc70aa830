"""A list is asked for page by page, and no page before the one before it was taken."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web
from kubernetes.aio import client

from posttrain.control.cluster import KubeCluster
from posttrain.control.kinds import CONFIG_MAP

PAGES = {"": (["a", "b"], "second"), "second": (["c"], "third"), "third": ([], "")}
"""By the token that asks for it: the names on a page, and the token of the next."""


class Server:
    """An API server that has one list."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        """The tokens of the pages that were asked for."""

    async def answer(self, request: web.Request) -> web.Response:
        token = request.query.get("continue", "")
        self.asked.append(token)
        names, following = PAGES[token]
        items = [{"metadata": {"name": name, "managedFields": [{"manager": "somebody"}]}} for name in names]
        return web.json_response({"metadata": {"resourceVersion": "7", "continue": following}, "items": items})

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[KubeCluster]:
        application = web.Application()
        application.add_routes([web.get("/api/v1/configmaps", self.answer)])
        runner = web.AppRunner(application)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        host, port = runner.addresses[0]
        cluster = KubeCluster(client.ApiClient(client.Configuration(host=f"http://{host}:{port}")))
        try:
            yield cluster
        finally:
            await cluster.close()
            await runner.cleanup()


def ask(question: Callable[[Server, KubeCluster], Awaitable[None]]) -> None:
    async def connect_and_ask() -> None:
        server = Server()
        async with server.connect() as cluster:
            await question(server, cluster)

    asyncio.run(connect_and_ask())


def build(name: str) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}}


def test_a_page_is_asked_for_when_the_one_before_it_was_taken() -> None:
    async def take(server: Server, cluster: KubeCluster) -> None:
        found = []
        async for page in cluster.pages(*CONFIG_MAP):
            found.append(page.items)
            assert len(server.asked) == len(found)
            assert page.resource_version == "7"
        assert found == [[build("a"), build("b")], [build("c")], []]

    ask(take)


def test_a_list_has_the_objects_of_all_its_pages() -> None:
    async def take(_: Server, cluster: KubeCluster) -> None:
        found = await cluster.list(*CONFIG_MAP)
        assert (found.items, found.resource_version) == ([build("a"), build("b"), build("c")], "7")

    ask(take)
