"""`/healthz` and `/readyz`: whether this replica lives, and whether it does its work, each with its reasons.

It owns the two answers; it must not change anything.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import web

from posttrain.control.leadership import Leadership
from posttrain.errors import UserError


def parse_address(text: str) -> tuple[str, int]:
    """Return host and port of `HOST:PORT`.

    Raises:
        UserError: it is not of that form.
    """
    host, separator, port = text.rpartition(":")
    if not separator or not port.isdecimal() or not 0 <= int(port) <= 65535:
        raise UserError(f"{text!r} is no address: write it as HOST:PORT, for example 0.0.0.0:8080")
    return host.strip("[]"), int(port)


@asynccontextmanager
async def serve_health(address: str, *, leadership: Leadership) -> AsyncIterator[None]:
    """Answer both while the block runs."""

    async def healthz(_: web.Request) -> web.Response:
        # That it answers at all says that the event loop turns.
        return web.Response(text="ok\n")

    async def readyz(_: web.Request) -> web.Response:
        reasons = leadership.unready()
        return web.Response(status=503 if reasons else 200, text="\n".join(reasons or ["ok"]) + "\n")

    application = web.Application()
    application.add_routes([web.get("/healthz", healthz), web.get("/readyz", readyz)])
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    host, port = parse_address(address)
    await web.TCPSite(runner, host, port).start()
    try:
        yield
    finally:
        await runner.cleanup()
